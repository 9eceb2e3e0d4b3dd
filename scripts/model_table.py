"""Print the README's table of models: parameters and multiply-accumulates measured here, accuracies as reported.

    python scripts/model_table.py

What is counted: `equivision_timm.checkpoints.model_card.complexity`. Reported by: the `released.json` of the rooms in
`checkpoints/`.
"""

import timm
import torch
from tqdm import tqdm

import equivision_timm
from equivision_timm.checkpoints.model_card import complexity
from equivision_timm.checkpoints.rooms import released
from equivision_timm.models import model_names


def main() -> None:
    names = [name for name in model_names() if not name.startswith("test_")]
    names.sort(
        key=lambda name: (name.endswith("_fast"), "reresnet" in name, int(name.split("resnet")[1].split("_")[0]))
    )
    print(f"torch {torch.__version__}, timm {timm.__version__}, equivision_timm {equivision_timm.__version__}\n")
    print("| model | fields | channels | parameters (M) | GMACs | top-1 | top-5 |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in tqdm(names, leave=False):
        with torch.device("meta"):
            stem = timm.create_model(name).feature_info[0]
        parameters, gmacs = complexity(name)
        reported = released().get(name)
        top1, top5 = (f"{100 * reported.reported[kind]:.1f}" if reported else "-" for kind in ("top1", "top5"))
        print(
            f"| `{name}` | {stem['num_fields']} | {stem['num_chs']} | {parameters / 1e6:.2f} | {gmacs:.1f} "
            f"| {top1} | {top5} |"
        )


if __name__ == "__main__":
    main()
