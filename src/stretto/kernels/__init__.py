"""Computing fast: native CPU kernels, each beside its plain reference; the best instructions are picked at run time."""
