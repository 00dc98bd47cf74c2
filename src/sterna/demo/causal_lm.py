"""The causal language model of the assets, converted once from its GGUF file to a plain model folder.

Reading the quantized file takes about twenty seconds, so benchmarks and tests use the folder. Needs transformers and gguf.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

from sterna.demo.assets import asset_path, cache_folder, settle
from sterna.needs import needed, quiet

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def causal_lm_folder(cache: Path | None = None) -> Path:
    """A folder with `config.json`, the tokenizer and 134,515,008 fp32 parameters in one safetensors file; converted on the first call.

    Raises:
        NotFound: the asset `causal-lm` has not been fetched.
        MissingDependency: transformers or gguf is not installed.
    """
    cache = cache or cache_folder()
    target = cache / "demo" / "smollm2-135m-instruct"
    if target.is_dir():
        return target
    source = asset_path("causal-lm", cache)
    transformers, torch = needed("transformers"), needed("torch")
    needed("gguf", install="gguf")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as partial, quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that nothing switches off
            model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        # The weights are plain floats now; transformers would otherwise refuse to save them as a quantized model.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        whole = Path(partial) / target.name
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        settle(whole, target)
    return target
