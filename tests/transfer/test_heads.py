"""Head ranges: a pool held by several processes is sent in chunks of one process's heads, each (layer, token, head)
exactly once, by whatever way the bytes go and in whatever encoding."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lanewise.policy.blocks import KVLayout
from lanewise.transfer import Aborted, Committed, Delivered, Faults, Limits, compat, messages, neighbour
from lanewise.transfer.chunks import Cutter, Slice, covers, digest
from lanewise.transfer.encoding import ENCODINGS, Encoding, wire_layout
from lanewise.transfer.sender_state import SenderTransfer
from lanewise.transfer.trial import References, Route

TOKENS, LAYERS, HEADS = 100, 5, 4
LAYOUT = KVLayout(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=8, dtype="float16", dtype_bytes=2)
ALL = Slice(0, TOKENS, 0, LAYERS, 0, HEADS)


# --- cutting


def tiles(pieces: list[Slice], whole: Slice, layout: KVLayout) -> bool:
    """What `covers` says, by counting every cell."""
    seen = np.zeros((whole.token_hi + 9, layout.num_layers + 9, layout.num_kv_heads + 9), int)
    for piece in pieces:
        seen[np.ix_(*piece.ranges)] += 1
    expected = np.zeros_like(seen)
    expected[np.ix_(*whole.ranges)] = 1
    return bool((seen == expected).all())


@given(
    shards=st.sampled_from([1, 2, 4]),
    encoding=st.sampled_from(ENCODINGS),
    have=st.sampled_from([0, 64]),
    max_bytes=st.sampled_from([1, 100, 1000, 5000, 1 << 20]),
    steps=st.lists(st.tuples(st.integers(0, 120), st.integers(0, 6), st.integers(0, 6)), max_size=6),
)
@settings(max_examples=150, deadline=None)
def test_cutter_tiles_the_prompt_however_it_becomes_ready(shards, encoding, have, max_bytes, steps):
    layout = wire_layout(LAYOUT, encoding)
    cutter, pieces = Cutter(layout, TOKENS, shards), []
    cutter.skip(have)
    for tokens, low, high in [*steps, (TOKENS, 0, 9)]:
        cutter.ready(tokens, range(low, high))
        while piece := cutter.peek(max_bytes):
            least = Slice(0, layout.wire_unit, 0, 1, 0, HEADS // shards).nbytes(layout)
            assert piece.nbytes(layout) <= max(max_bytes, least)
            assert (piece.head_lo % (HEADS // shards), len(piece.heads)) == (0, HEADS // shards)
            assert piece.token_lo % layout.wire_unit == 0
            cutter.take(piece)
            pieces.append(piece)
    assert cutter.done
    whole = replace_slice(ALL, token_lo=have)
    assert tiles(pieces, whole, layout)
    assert covers(pieces, whole.tokens, layout)
    assert sum(piece.nbytes(layout) for piece in pieces) == whole.nbytes(layout)
    if encoding == "Native":
        assert sum(piece.wire_bytes(layout) for piece in pieces) == whole.wire_bytes(layout)


def test_a_pool_in_one_piece_sends_all_heads_together():
    cutter = Cutter(LAYOUT, TOKENS)
    cutter.ready(TOKENS, range(LAYERS))
    assert cutter.peek(1 << 20) == ALL
    parts = Cutter(LAYOUT, TOKENS, 2)
    parts.ready(TOKENS, range(LAYERS))
    parts.take(first := parts.peek(1 << 20))
    assert [first, parts.peek(1 << 20)] == [replace_slice(ALL, head_hi=2), replace_slice(ALL, head_lo=2)]


def replace_slice(piece: Slice, **change: int) -> Slice:
    return Slice(**({name: getattr(piece, name) for name in Slice.__struct_fields__} | change))


def extents(size: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, size), st.integers(0, size + 1)).filter(lambda pair: pair[0] < pair[1])


BOXES = st.tuples(extents(4), extents(3), extents(3)).map(lambda ranges: Slice(*itertools.chain(*ranges)))
SMALL = KVLayout(num_layers=3, num_kv_heads=3, head_dim=1, dtype="float32", dtype_bytes=4)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_covers_says_what_counting_every_cell_says(data):
    """Of random boxes, and of a tiling that is right or has one box moved, doubled, left out or made larger."""
    have = data.draw(st.integers(0, 4))
    whole = Slice(have, 4, 0, 3, 0, 3)
    if data.draw(st.booleans()):
        pieces = split(data, whole) if have < 4 else []
        if pieces and data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(pieces) - 1))
            pieces[at : at + 1] = data.draw(st.lists(BOXES, max_size=2)) + [pieces[at]] * data.draw(st.integers(0, 1))
    else:
        pieces = data.draw(st.lists(BOXES, max_size=4))
    assert covers(pieces, whole.tokens, SMALL) is tiles(pieces, whole, SMALL)


def split(data: st.DataObject, box: Slice) -> list[Slice]:
    """The box cut across any dimension, and its parts again."""
    names = [name for name in ("token", "layer", "head") if len(getattr(box, name + "s")) > 1]
    if not names or not data.draw(st.integers(0, 2)):
        return [box]
    name = data.draw(st.sampled_from(names))
    extent = getattr(box, name + "s")
    edge = data.draw(st.integers(extent.start + 1, extent.stop - 1))
    parts = replace_slice(box, **{name + "_hi": edge}), replace_slice(box, **{name + "_lo": edge})
    return [piece for part in parts for piece in split(data, part)]


@given(BOXES, BOXES)
def test_boxes_overlap_where_they_share_a_cell(one, other):
    shared = set(itertools.product(*one.ranges)) & set(itertools.product(*other.ranges))
    assert one.overlaps(other) is other.overlaps(one) is bool(shared)


@pytest.mark.parametrize("name", Slice.__struct_fields__)
def test_the_digest_is_of_every_edge(name):
    moved = replace_slice(ALL, **{name: getattr(ALL, name) + 1})
    assert digest([(b"12345678", ALL)]) != digest([(b"12345678", moved)])


# --- encodings


@pytest.mark.parametrize("name", [name for name in ENCODINGS if name != "Native"])
@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 150), layers=st.integers(1, 2), heads=extents(HEADS - 1), seed=st.integers(0, 99))
def test_heads_are_encoded_alone_as_they_are_together(name, tokens, layers, heads, seed):
    layout = wire_layout(replace(LAYOUT, dtype="float32", dtype_bytes=4), name)
    encoding, shape = Encoding(layout), (layers, 2, tokens, HEADS, layout.head_dim)
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

    def back(part: np.ndarray, piece: Slice) -> np.ndarray:
        out = np.empty(piece.wire_bytes(layout), np.uint8)
        encoding.encode(np.ascontiguousarray(part).reshape(-1).view(np.uint8), tokens, layers, out)
        decoded = encoding.decode(out.data, tokens, layers)
        assert len(decoded) == piece.nbytes(layout)
        return decoded.view(np.float32).reshape(part.shape)

    whole = back(values, Slice(0, tokens, 0, layers, 0, HEADS))
    part = back(values[:, :, :, slice(*heads)], Slice(0, tokens, 0, layers, *heads))
    assert np.array_equal(part, whole[:, :, :, slice(*heads)])


# --- through the channel


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides live in this process here, and count as neighbours."""
    monkeypatch.setattr(neighbour, "is_own", lambda pid: False)


class Watched:
    """What a store was asked for, and that a range never spans two of its shards."""

    def __init__(self, store, shards: int) -> None:
        self.cells: Counter[tuple[int, int, int]] = Counter()
        self.heads: set[range] = set()
        each = store.layout.num_kv_heads // shards
        for name in ("read", "views"):
            setattr(store, name, self.watch(getattr(store, name), each))

    def watch(self, real, each):
        def asked(pages, tokens, layers, heads, *rest):
            assert heads.start // each == (heads.stop - 1) // each, f"{heads} of several processes"
            found = real(pages, tokens, layers, heads, *rest)
            if found is not None:
                self.heads.add(heads)
                self.cells.update(itertools.product(tokens, layers, heads))
            return found

        return asked


WAYS = ["zmq", "direct", "reference"]


def sides(net, way, *, encoding="Native", in_place=True, **options):
    """A sender whose four heads lie in two processes, and a receiver that has them all; `way` is up."""
    if way == "reference" and not neighbour.place():
        pytest.skip("no process_vm_readv")
    net.direct = way != "zmq"
    limits = Limits(chunk_bytes=6000, referred_bytes=6000, least_piece_bytes=1)
    layout = wire_layout(replace(net.layout, num_kv_heads=HEADS, head_dim=8), encoding)
    references = References.ALWAYS if way == "reference" else References.NEVER
    end = net.endpoint(layout=layout)
    prefill = net.prefill(end, limits=limits, head_shards=2, references=references, **options)
    decode = net.decode(net.endpoint(layout=layout), limits=limits, timers=options.get("timers"))
    prefill.store.in_place, decode.store.in_place = True, in_place
    decode.grant_all()
    prefill.sender.connect(decode.peer)
    if way != "zmq":
        outlets = prefill.sender._thread._ways.outlets
        route = Route.REFERENCE if way == "reference" else Route.BYTES
        net.eventually(lambda: (to := outlets.to(decode.address)) and to.route is route, f"the way {way}")
    return prefill, decode


def move(net, prefill, decode, key, tokens):
    ids = list(range(tokens))
    pages = prefill.store.take(tokens)
    shape = prefill.store.pool[:, :, pages].shape
    values = np.random.default_rng(tokens).standard_normal((*shape[:-1], shape[-1] // 4)).astype(np.float32)
    prefill.store.pool[:, :, pages] = values.view(np.uint8)
    decode.receiver.expect(key, ids, net.cache_key)
    prefill.sender.begin(key, decode.peer, ids, net.cache_key, pages)
    prefill.sender.ready(key, tokens // 2, range(2))
    prefill.sender.commit(key, net.token(key))
    return pages


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_each_head_goes_once_from_the_process_that_has_it(net, near, way, in_place):
    prefill, decode = sides(net, way, in_place=in_place)
    for number, tokens in enumerate((1, 70, 200)):
        key = ("r", number)
        watched = Watched(prefill.store, 2)
        pages = move(net, prefill, decode, key, tokens)
        decode.log.wait(Committed, key)
        prefill.log.wait(Delivered, key)
        cells = itertools.product(range(tokens), range(3), range(HEADS))
        assert watched.cells == Counter(cells)
        assert watched.heads == {range(2), range(2, 4)}
        del prefill.store.read, prefill.store.views
        assert np.array_equal(prefill.kv(pages, range(tokens)), decode.kv(key, range(tokens)))
    seen = prefill.sender.snapshot()
    assert seen.bytes_sent == 271 * prefill.identity.layout.bytes_per_token
    assert seen.chunks_referred == (seen.chunks_sent if way == "reference" else 0)
    assert (decode.store.written == 0) is (in_place and way != "zmq")


@pytest.mark.parametrize("what", ["drop", "duplicate", "corrupt", "truncate", "delay"])
@pytest.mark.parametrize("way", WAYS)
def test_faults_of_chunks_of_some_heads_are_made_good(net, near, way, what):
    faults = Faults.parse(f"f={what}@CHUNK#3{':50ms' * (what == 'delay')};g=corrupt@CHUNK#6")
    prefill, decode = sides(net, way, timers=net.fast, faults=faults)
    for number in range(2):
        pages = move(net, prefill, decode, ("r", number), 150)
        prefill.log.wait(Delivered, ("r", number))
        assert np.array_equal(prefill.kv(pages, range(150)), decode.kv(("r", number), range(150)))


@pytest.mark.parametrize("way", ["zmq", "direct"])
@pytest.mark.parametrize("name", [name for name in ENCODINGS if name != "Native"])
def test_encoded_heads_arrive_as_if_all_had_gone_together(net, way, name):
    prefill, decode = sides(net, way, encoding=name)
    layout = prefill.identity.layout
    pages = move(net, prefill, decode, ("r", 1), 150)
    prefill.log.wait(Delivered, ("r", 1))
    encoding, out = Encoding(layout), np.empty(layout.wire_bytes(150, 3), np.uint8)
    encoding.encode(prefill.kv(pages, range(150)), 150, 3, out)
    assert np.array_equal(decode.kv(("r", 1), range(150)), encoding.decode(out.data, 150, 3))
    assert prefill.sender.snapshot().bytes_sent == len(out)


def test_heads_beyond_the_layout_end_the_transfer_on_both_sides(net, monkeypatch):
    """A sender that names a head range which is none: no byte of it is written."""
    prefill, decode = sides(net, "zmq", timers=net.fast)
    real = SenderTransfer.chunk

    def wrong(*arguments):
        return msgspec.structs.replace(real(*arguments), head_lo=2, head_hi=5)

    monkeypatch.setattr(SenderTransfer, "chunk", wrong)
    move(net, prefill, decode, ("r", 1), 70)
    for side in (prefill, decode):
        assert "lies outside what was granted" in side.log.wait(Aborted, ("r", 1)).reason
    assert not decode.store.pool.any()


def test_a_side_that_knows_all_heads_only_is_refused_by_name(net):
    end = net.endpoint()
    older = msgspec.structs.replace(compat.hello(end, "d"), protocol=1)
    assert compat.differences(end, older) == f"protocol: {messages.PROTOCOL} here, 1 there"
