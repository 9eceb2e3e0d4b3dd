"""Print the README's table of models: parameters and multiply-accumulates measured here, accuracies as reported.

    python scripts/model_table.py

Counts at 224 x 224 with `torch.utils.flop_counter` on the fused network, whose convolutions are the expanded ones
(the form in which every weight is multiplied with every pixel; nothing is executed, the tensors are on `meta`).
"""

import timm
import torch
from timm.utils.model import reparameterize_model
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import equivision_timm

# Top-1 and top-5 on ImageNet-1k at 224 as reported by the original, https://github.com/dmklee/equivision
REPORTED = {
    "d1resnet18": (70.9, 90.1),
    "c4resnet18": (73.4, 91.5),
    "d4resnet18": (73.7, 91.6),
    "c8resnet18": (73.8, 91.4),
    "d8resnet18": (73.6, 91.5),
    "d1resnet50": (76.9, 93.5),
    "c4resnet50": (78.5, 94.3),
    "d4resnet50": (78.9, 94.6),
    "c8resnet50": (78.7, 94.5),
    "d1resnet101": (78.5, 93.7),
    "c4resnet101": (80.1, 95.2),
    "d4resnet101": (80.4, 95.3),
}


def measure(name: str) -> tuple[int, int, float, float]:
    """Fields of the stem, channels of the stem, parameters in millions and GMACs of one image."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            reparameterize_model(model)(torch.empty(1, 3, 224, 224))
    counts = counter.get_flop_counts()["Global"]
    flops = sum(count for op, count in counts.items() if "convolution" in str(op) or "addmm" in str(op))
    stem = model.feature_info[0]
    return stem["num_fields"], stem["num_chs"], parameters, flops / 2 / 1e9


def main() -> None:
    names = [name for name in timm.list_models(module="equivariant_resnet") if not name.startswith("test_")]
    names.sort(key=lambda name: (name.endswith("_fast"), int(name.split("resnet")[1].split("_")[0])))
    print(f"torch {torch.__version__}, timm {timm.__version__}, equivision_timm {equivision_timm.__version__}\n")
    print("| model | fields | channels | parameters (M) | GMACs | top-1 | top-5 |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in tqdm(names, leave=False):
        fields, channels, parameters, gmacs = measure(name)
        top1, top5 = REPORTED.get(name, ("-", "-"))
        print(f"| `{name}` | {fields} | {channels} | {parameters:.2f} | {gmacs:.1f} | {top1} | {top5} |")


if __name__ == "__main__":
    main()
