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
