"""Our checkpoints in vLLM: quant_method lrcompress, found through the entry point group `vllm.general_plugins`."""


def register() -> None:
    """Make the quant_method known. vLLM calls it in every process, some of them twice."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from lrcompress.checkpoint.manifest import QUANT_METHOD

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        from lrcompress.vllm_plugin.method import Compressed

        register_quantization_config(QUANT_METHOD)(Compressed)
