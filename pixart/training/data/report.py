"""What `--dry-run` says of pictures: nothing is computed or written for it."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from ...text.encoder import find_tokenizer_of, open_weights
from ...text.tokenizer import Tokenizer
from .album import NAMED, Album, Entry, is_small
from .folder import repeats_of
from .stored import PIXELS

SHOWN_BINS = 8
MANY = 100  # repeats of a picture; more may be a year that begins a folder's name
BYTES = 2  # of a stored number
PER_FILE = 4096  # what a file takes at least on most disks


def describe(album: Album, held_out: Sequence[Entry]) -> Iterator[str]:
    """Lines, the most general first."""
    items = [entry.item for entry in album.entries]
    repeated = sum(item.repeats for item in items)
    more = f", {repeated} with repeats" if repeated != len(items) else ""
    yield f"data: {album.listing.layout}, {len(items)} pictures{more}" + (f", {len(held_out)} of them held out" if held_out else "")
    yield from _left_out(album)
    if album.broken:
        allowed = "" if not album.too_broken or album.settings.allow_broken else " This is more than one in a hundred, and an error."
        yield f"broken: {album.broken_words()}{allowed}"
    yield from _repeats(album)
    yield from _bins(album)
    yield from _captions(album)
    yield from _work(album)


def _bins(album: Album) -> Iterator[str]:
    for shape, sizes in album.bins.items():
        counts = Counter(sizes).most_common()
        shown = ", ".join(f"{width}x{height} {count}" for (height, width), count in counts[:SHOWN_BINS])
        rest = sum(count for _, count in counts[SHOWN_BINS:])
        more = f", {len(counts) - SHOWN_BINS} more {rest}" if rest else ""
        yield f"{shape.base_size} px, {'squares' if shape.squares else f'{len(counts)} bins'} (width x height): {shown}{more}"
        small = [entry.item.name for entry, size in zip(album.entries, sizes) if is_small(entry.size, size)]
        if small:
            remedy = "which are enlarged (source.skip_small leaves them out)"
            yield f"too small at {shape.base_size} px: {len(small)}, {remedy}: {_named(small)}"


def oddities(album: Album) -> Iterator[str]:
    """Lines on what may not be meant, which a run says too."""
    yield from _left_out(album)
    yield from _repeats(album)
    yield from _without_caption(album)


def _left_out(album: Album) -> Iterator[str]:
    for why, count in album.listing.left_out.items():
        yield f"left out: {count} {why}"


def _repeats(album: Album) -> Iterator[str]:
    items = [entry.item for entry in album.entries if entry.item.repeats > MANY]
    often = [item for item in items if repeats_of(PurePath(item.name).parent)[0] == item.repeats]
    if often:
        most = max(item.repeats for item in often)
        yield (
            f"repeats: {len(often)} pictures count up to {most} times, as the number before _ in their folder's name says: "
            f"{_named([item.name for item in often])}"
        )


def _without_caption(album: Album) -> Iterator[str]:
    without = [entry.item.name for entry in album.entries if not any(each.text or each.states for each in entry.captions)]
    if without:
        yield f"without caption: {len(without)}, which are trained as the empty prompt: {_named(without)}"


def _captions(album: Album) -> Iterator[str]:
    yield from _without_caption(album)
    tokenizer, limit = _tokenizer(album), album.variant.max_tokens
    if tokenizer is None:
        return
    counts = {entry.item.name: max(_tokens(tokenizer, each.text) for each in entry.captions) for entry in album.entries}
    long = [name for name, count in counts.items() if count > limit]
    yield f"captions: {sum(counts.values()) / len(counts):.0f} tokens on average, {max(counts.values())} at most; the limit is {limit}"
    if long:
        yield f"too long: {len(long)}, whose last words are lost: {_named(long)}"


def _work(album: Album) -> Iterator[str]:
    texts, pictures = album.missing_texts() if album.settings.text_encoder else [], album.missing_pictures()
    tokenizer, config = _tokenizer(album), album.variant.transformer
    tokens = sum(min(_tokens(tokenizer, each.text), album.variant.max_tokens) for each in texts) if tokenizer else 0
    sizes = [tokens * config.caption_channels * BYTES, PER_FILE * (len(texts) + len(pictures))]
    for picture in pictures:
        numbers = config.in_channels * picture.size[0] * picture.size[1] // PIXELS**2
        sizes.append(BYTES * numbers * (2 * bool(picture.latent) + bool(picture.hint)))
    yield (
        f"to compute: {len(texts)} captions by T5, {len(pictures)} pictures by the VAE; about {sum(sizes) / 2**20:.1f} MiB "
        f"more in the cache {album.cache.folder}"
    )


def _tokenizer(album: Album) -> Tokenizer | None:
    """T5's alone; its weights are not read."""
    return find_tokenizer_of(open_weights(album.settings.text_encoder)[0], None) if album.settings.text_encoder else None


def _tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.vocabulary.ids(text)) + 1


def _named(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")

