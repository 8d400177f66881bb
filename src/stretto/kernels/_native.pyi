def best_level() -> str: ...
def decode_attention(
    level: str,
    threads: int,
    query: int,
    row_stride: int,
    cache: int,
    table: int,
    table_width: int,
    length: int,
    out: int,
    rows: int,
    kv_heads: int,
    group: int,
    page_tokens: int,
    dim: int,
    is_bf16: bool,
) -> None: ...
def rotate(
    level: str,
    threads: int,
    heads: int,
    row_stride: int,
    turns: int,
    rows: int,
    count: int,
    dim: int,
    is_bf16: bool,
) -> None: ...
def gated_silu(level: str, threads: int, both: int, out: int, rows: int, width: int, is_bf16: bool) -> None: ...
def scatter(
    threads: int, source: int, row_stride: int, cache: int, to: int, rows: int, count: int, size: int
) -> None: ...

class Packed:
    def __init__(
        self,
        data: int,
        columns: int,
        inner: int,
        group: int,
        bits: int,
        minimum: bool,
        order: int,
        steps: int,
        units: int,
    ) -> None: ...
    @property
    def bytes(self) -> int: ...

def pack(packed: Packed, values: int, scales: int, minima: int) -> None: ...
def put_on_grid(packed: Packed, units: int) -> None: ...
def pack_numbers(packed: Packed, values: int) -> None: ...
def pack_page(source: int, dim: int, keys: bool, to: int) -> None: ...
def pack_gguf(packed: Packed, blocks: int) -> None: ...
def packed_multiply(
    level: str, path: str, threads: int, packed: Packed, x: int, rows: int, length: int, out: int
) -> None: ...

class Decoder:
    def __init__(
        self, hidden: int, heads: int, kv_heads: int, dim: int, ffn: int, vocab: int, epsilon: float, crew: int
    ) -> None: ...
    def add_layer(
        self,
        qkv: Packed,
        out: Packed,
        gate_up: Packed,
        down: Packed,
        norm_attention: int,
        norm_mlp: int,
        bias: int,
        qk_norm: int,
    ) -> None: ...
    def set_embedding(self, table: Packed | None, rows: int) -> None: ...
    def set_head(self, head: Packed, norm: int) -> None: ...
    def forward(
        self,
        level: str,
        path: str,
        threads: int,
        tokens: int,
        rows: int,
        turns: int,
        lengths: int,
        tables: int,
        table_width: int,
        caches: list[int],
        page_tokens: int,
        cache_is_bf16: bool,
        open_pages: list[int],
        open_tables: int,
        wanted: int,
        num_wanted: int,
        logits: int,
        picks: int,
    ) -> tuple[float, float, float]: ...
