"""`generate --on comfy --hosts A B`: the pictures are queued to several running ComfyUIs, through their queue API alone.

Each host is given one picture after the other. What a host had when it died, or failed at, another draws.
"""
from __future__ import annotations

import copy
import io
import threading
import time
from collections import deque
from collections.abc import Sequence
from http.client import HTTPException
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import InputError, UnsupportedError
from ..logs import get_logger
from .book import Book
from .draw_stage import DRAWN, DrawStage, save_picture
from .drive import PAUSE, one_line, progress
from .graph import Graph, picture_graph
from .many import forget_failures, indexed, prepare
from .prompt_rows import Picture
from .stage import Chunk, Row

logger = get_logger(__name__)

PORT = 8188
PATIENCE = 30.0  # seconds without an answer, after which a host counts as dead
LOOK = 2.0  # seconds between looks at a host's queue
TRIES = 2  # at least, of a picture that a host refuses or fails at; every living host has one
GATEWAY = (502, 503, 504)  # what a proxy answers in the place of a host that is gone


def generate_on_comfy(draw: DrawStage, hosts: Sequence[str], graph: Graph | None, overwrite: bool = False) -> list[Row]:
    """Draws what isn't drawn yet; the rows of the index. `draw` has one picture a chunk. Raises PixArtError and OSError."""
    if not hosts:
        raise InputError("--on comfy needs --hosts, e.g. --hosts 127.0.0.1:8188 10.0.0.5:8188.")
    graphs = Graphs(draw, graph)
    prepare(draw, overwrite)
    forget_failures(draw)
    return indexed(draw, lambda: Fleet(draw, graphs, hosts).run())


def load_graph(path: Path) -> Graph:
    """A user's graph; raises InputError."""
    try:
        found = import_module("launch.graph").load(path)
    except RuntimeError as error:
        raise InputError(str(error)) from None
    if not isinstance(found, dict) or not all(isinstance(node, dict) and "class_type" in node for node in found.values()) or not found:
        raise InputError(f"{path} is not a workflow in API format; export it in ComfyUI with Workflow, Export (API).")
    return found


class Graphs:
    """The graph of each picture: the plain one, or a user's with prompt, seed and sizes set by the titles of its nodes."""

    def __init__(self, draw: DrawStage, graph: Graph | None) -> None:
        self.draw, self.graph, self.settings = draw, graph, import_module("launch.graph")
        self.of(draw.chunks[0].items[0])  # tells what is wrong before anything is queued

    def of(self, picture: Picture) -> Graph:
        """Raises InputError for a graph without the nodes that have to be set."""
        if self.graph is None:
            settings = self.draw.settings
            plain = picture_graph(picture, settings.graph, settings.sampler, settings.schedule)
            if plain is None:
                raise InputError(f"--on comfy has no graph for --sampler {settings.sampler} --schedule {settings.schedule}; give --graph.")
            return plain
        graph = copy.deepcopy(self.graph)
        values = {"prompt": picture.prompt, "negative": picture.negative, "seed": picture.seed, "steps": picture.steps}
        values |= {"cfg": picture.guidance, "width": picture.width, "height": picture.height}
        try:
            self.settings.configure(graph, values)
        except RuntimeError as error:
            raise InputError(f"--graph: {error} Give its nodes the titles Prompt, Negative prompt, Sampler and Size.") from None
        return graph


class Fleet:
    """Hosts that take pictures from one list, each in a thread of its own."""

    def __init__(self, draw: DrawStage, graphs: Graphs, hosts: Sequence[str]) -> None:
        self.draw, self.graphs, self.book = draw, graphs, Book(draw)
        self.client = import_module("launch.client")
        self.waiting: deque[Chunk] = deque(chunk for chunk in draw.chunks if not self.book.is_done(chunk))
        self.errors: dict[str, list[str]] = {}
        self.failed_at: dict[str, set[str]] = {}  # hosts by picture
        self.dead: dict[str, str] = {}
        self.fatal: Exception | None = None
        self.stopped = threading.Event()
        self.open = len(self.waiting)
        self.lock = threading.Lock()
        self.hosts = list(dict.fromkeys(self._url(host) for host in hosts))
        self.living: set[str] = set()

    def run(self) -> None:
        """Returns when every picture is drawn or has failed; raises UnsupportedError when no host is left."""
        clients = {host: self.client.ComfyClient(host, timeout=PATIENCE) for host in self.hosts}
        living = [host for host in self.hosts if self.open and self._answers(host, clients[host])]
        self.living = set(living)
        if self.open and not living:
            raise UnsupportedError(f"No ComfyUI can draw: {self._dead()}.")
        threads = [threading.Thread(target=self._serve, args=(host, clients[host]), daemon=True) for host in living]
        for thread in threads:
            thread.start()
        try:
            with progress(self.draw, shown=True) as show:
                while any(thread.is_alive() for thread in threads):
                    time.sleep(PAUSE)
                    show()
        finally:
            self.stopped.set()
        if self.fatal is not None:
            raise self.fatal
        if self.open:
            raise UnsupportedError(f"No ComfyUI is left: {self._dead()}. What was drawn stays; start them and run the command again.")

    def _serve(self, host: str, client: Any) -> None:
        """One host's thread, until nothing is left or it dies."""
        while not self.stopped.is_set() and self.open:
            chunk = self._next(host)
            if chunk is None:
                time.sleep(PAUSE)  # others may give theirs back
                continue
            try:
                self._finish(chunk, client)
            except OSError as error:
                self._give_back(chunk)
                if not isinstance(error, HostError):  # of this machine: a full disk
                    self.fatal = error
                    self.stopped.set()
                    return
                self.dead[host] = one_line(error)
                with self.lock:
                    self.living.discard(host)
                logger.warning("%s is given up (%s); its picture is drawn by another.", host, one_line(error))
                return
            except Exception as error:  # a thread would end without a word
                self.fatal = error
                self.stopped.set()
                return

    def _next(self, host: str) -> Chunk | None:
        """The first picture that waits; one that the host failed at is left to the others as long as they have not."""
        with self.lock:
            for number, chunk in enumerate(self.waiting):
                failed = self.failed_at.get(chunk.items[0].file, set())
                if host not in failed or self.living <= failed:
                    del self.waiting[number]
                    return chunk
        return None

    def _give_back(self, chunk: Chunk) -> None:
        with self.lock:  # another thread may be looking through them
            self.waiting.append(chunk)

    def _finish(self, chunk: Chunk, client: Any) -> None:
        """Draws one picture, unless another run is at it or has drawn it; raises HostError if the host dies."""
        with self.book.claim(chunk, wait=False) as ours:
            if ours and not self.book.is_done(chunk):
                row = self._draw(chunk.items[0], client)
                if row is None:
                    self._give_back(chunk)
                    return
                self.book.write(chunk, [row])
        if not ours:
            self._give_back(chunk)
            time.sleep(PAUSE)
            return
        with self.lock:
            self.open -= 1

    def _draw(self, picture: Picture, client: Any) -> Row | None:
        """The row of a picture; None if it is to be tried once more, by whichever host comes."""
        graph = self.graphs.of(picture)
        try:
            image = self._opened(self._picture(client, graph))
        except self.client.QueueError as error:
            with self.lock:
                problems = self.errors.setdefault(picture.file, [])
                problems.append(f"{one_line(error)} ({client.url})")
                self.failed_at.setdefault(picture.file, set()).add(client.url)
                final = len(problems) >= TRIES and self.living <= self.failed_at[picture.file]
            return self.draw.failed(picture, problems[-1]) if final else None
        if not (self.draw.place / picture.file).is_file():
            save_picture(self.draw, picture, image, graph)
        return self.draw.row(picture, DRAWN, host=client.url)

    def _opened(self, content: bytes) -> Any:
        from PIL import Image

        try:
            return Image.open(io.BytesIO(content)).convert("RGB")
        except Exception as error:  # Pillow has many errors for files that are no pictures
            raise self.client.QueueError(f"the host's file is not a picture ({error})", {}) from None

    def _picture(self, client: Any, graph: Graph) -> bytes:
        """The file that the host saved; QueueError if the graph failed, HostError if the host went away with it."""
        try:
            number = client.queue(graph)
            while not self.stopped.is_set():
                try:
                    outputs = client.wait(number, timeout=LOOK)["outputs"]
                except self.client.QueueError:
                    raise
                except self.client.LaunchError:  # not done yet
                    if not self._knows(client, number):
                        raise HostError("it was restarted and has lost the picture") from None
                    continue
                shown = [image for node in outputs.values() for image in node.get("images", []) if image.get("type") == "output"]
                if not shown:
                    raise self.client.QueueError("the graph saves no picture", {})
                return client.image(shown[-1])
        except HostError:
            raise
        except self.client.QueueError as error:
            if error.status in GATEWAY:
                raise HostError(f"it is gone: {one_line(error)}") from None
            raise
        except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:  # broken off, or not ComfyUI's JSON
            raise HostError(f"it doesn't answer: {one_line(error)}") from None
        raise HostError("the run was stopped")

    def _knows(self, client: Any, number: str) -> bool:
        """Whether a picture is still in the host's queue, or came out of it just now."""
        queue = client.get_json("/queue")
        listed = [entry[1] for entry in (*queue.get("queue_running", ()), *queue.get("queue_pending", ()))]
        return number in listed or number in client.get_json(f"/history/{number}")

    def _answers(self, host: str, client: Any) -> bool:
        """Whether a host is there and has every node of the graph; if not, `dead` says why."""
        kinds = {node["class_type"] for node in self.graphs.of(self.waiting[0].items[0]).values()}
        try:
            missing = sorted(kinds - client.get_json("/object_info").keys())
            self.dead.update({host: f"it lacks the nodes {', '.join(missing)}; install this pack there"} if missing else {})
        except (OSError, HTTPException, ValueError, AttributeError) as error:
            self.dead[host] = f"no ComfyUI answers ({one_line(error)})"
        if host in self.dead:
            logger.warning("%s: %s", host, self.dead[host])
        return host not in self.dead

    def _dead(self) -> str:
        return "; ".join(f"{host}: {why}" for host, why in self.dead.items())

    @staticmethod
    def _url(host: str) -> str:
        """http://name:port of what was given; raises InputError."""
        name = host if "://" in host else f"http://{host}"
        scheme, _, rest = name.partition("://")
        place, _, port = rest.rstrip("/").partition(":")
        if scheme != "http" or not place or "/" in rest.rstrip("/") or (port and not port.isdecimal()):
            raise InputError(f"--hosts has {host!r}; expected a name and port such as 10.0.0.5:8188.")
        return f"http://{place}:{port or PORT}"


class HostError(OSError):
    """A host that died or can't be reached; its picture is given to another."""
