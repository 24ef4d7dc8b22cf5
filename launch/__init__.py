"""What quickstart.py is made of: the environment, the host process, its queue. Standard library only."""
