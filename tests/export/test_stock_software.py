"""An interpreter that cannot import rankwise loads the exports and computes the trained logits."""

import subprocess
import sys

from safetensors.torch import save_file

from rankwise.export.live import computed_logits
from rankwise.export.write import export_adapter
from tests.export.trained import ARCHITECTURES, trained

SCRIPT = """
import sys, warnings
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "rankwise":
            raise ImportError("rankwise is blocked")
sys.meta_path.insert(0, Block())
try:
    import rankwise
except ImportError:
    pass
else:
    raise SystemExit("rankwise could be imported")
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
root = sys.argv[1]
stored = load_file(root + "/case.safetensors")
expected = stored.pop("logits")
def error(model):
    with torch.no_grad():
        logits = model.eval()(**stored).logits
    return float((logits - expected).abs().max() / expected.abs().max())
base = lambda: LlamaForCausalLM.from_pretrained(root + "/base")
print("base", error(base()))
for layout in ("uniform", "compact"):
    print("peft", error(PeftModel.from_pretrained(base(), root + "/" + layout)))
    model = base()
    model.load_adapter(root + "/" + layout)
    print("transformers", error(model))
print("modules", [name for name in sys.modules if name.split(".")[0] == "rankwise"])
"""


def test_stock_peft_and_transformers_without_rankwise_compute_the_trained_logits(tmp_path):
    model, plan = trained("llama", ranks=(3, 0, 1, 4, 2, 5, 9, 6))
    batch = ARCHITECTURES["llama"].batch()
    ARCHITECTURES["llama"].build().save_pretrained(tmp_path / "base")
    save_file({**batch, "logits": computed_logits(model, batch)}, tmp_path / "case.safetensors")
    for layout in ("uniform", "compact"):
        export_adapter(model, tmp_path / layout, layout=layout, plan=plan)
    run = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False, timeout=240
    )
    assert run.returncode == 0, run.stderr
    lines = [line.split(maxsplit=1) for line in run.stdout.splitlines()]
    errors = [(kind, float(value)) for kind, value in lines if kind != "modules"]
    assert errors[0][1] > 1e-2, "the adapter must move the logits"
    assert [kind for kind, _ in errors[1:]] == ["peft", "transformers"] * 2
    assert max(value for _, value in errors[1:]) < 1e-5
    assert ["modules", "[]"] in lines
