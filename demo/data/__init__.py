"""What the demo draws: scenes, their captions and outlines, and the reader that tells what a picture shows."""
