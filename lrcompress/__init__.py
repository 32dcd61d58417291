"""lrcompress compresses language-model checkpoints after training.

`import lrcompress` is all that `transformers.AutoModelForCausalLM.from_pretrained` needs to load what it writes.
"""

from lrcompress._autoload import register_with_transformers

__version__ = "0.2.0"

register_with_transformers()
