"""Where is the bundled starter model? A small Llama-architecture decoder for demo and tests without any download.

Modules: `skills` (the general skills it was pre-trained on), `tasks` (the frozen downstream tasks), `exact` (exact
answers; needs torch). This file imports nothing heavy.
"""

from pathlib import Path


def starter_folder() -> Path:
    """Folder of the bundled Hugging Face model: config, bf16 weights, tokenizer, card."""
    return Path(__file__).parent / "model"


def frozen_task_file() -> Path:
    """File that fixes skills, tasks, splits, rates and target before any method runs on them."""
    return Path(__file__).parent / "frozen_task.json"
