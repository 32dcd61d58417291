"""LoRA adapters on the tiny models, saved by PEFT itself."""

import pytest
import torch


def fill(model, seed, dtype=torch.float32, decay=0.7):
    """Random numbers in every LoRA parameter, the components of falling size; block 0 has twice the others'."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                values = torch.randn(parameter.shape, generator=generator)
                if "lora_B" in name and parameter.dim() == 2:
                    values *= (2 if ".0." in name else 1) * decay ** torch.arange(parameter.shape[1])
                if parameter.dtype == dtype:
                    parameter.copy_(0.2 * values)  # in its place, where a tied layer finds it too
                else:
                    parameter.data = (0.2 * values).to(dtype)


@pytest.fixture
def make_adapter(make_model, tmp_path):
    """make_adapter(seed=0, architecture, dtype, **LoraConfig): the folder of a saved adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def make(seed=0, architecture="llama", dtype=torch.float32, name="adapter", decay=0.7, **config):
        dense = AutoModelForCausalLM.from_pretrained(make_model(architecture))
        defaults = {"r": 8, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        model = get_peft_model(dense, LoraConfig(task_type="CAUSAL_LM", **{**defaults, **config}))
        fill(model, seed, dtype, decay)
        folder = tmp_path / f"{name}-{seed}"
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def load_adapter(make_model):
    """load_adapter(folder, architecture): PEFT's model in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load(folder, architecture="llama"):
        dense = AutoModelForCausalLM.from_pretrained(make_model(architecture))
        return PeftModel.from_pretrained(dense, folder).eval()

    return load


@torch.no_grad()
def deltas(model):
    """Module to the update (out, in) that PEFT adds, float64, multiplied out from the parameters that it loaded."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            left, right = module.lora_B["default"].weight.double(), module.lora_A["default"].weight.double()
            found[name] = module.scaling["default"] * left @ right
    return found


@torch.no_grad()
def embedding_delta(model):
    """The update (tokens, width) of the embeddings, as `deltas`; None where there is none."""
    for module in model.base_model.model.modules():
        if "default" in getattr(module, "lora_embedding_A", ()):
            left, right = module.lora_embedding_B["default"].double(), module.lora_embedding_A["default"].double()
            return module.scaling["default"] * (left @ right).T
    return None


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(2, 42)[None]).logits
