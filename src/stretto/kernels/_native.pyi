def best_level() -> str: ...
def decode_attention(
    level: str,
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
