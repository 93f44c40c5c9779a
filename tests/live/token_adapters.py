"""Makes adapters that each answer with one word: behaviour that a test can tell apart at a glance.

LoRA on `down_proj` of the last layer alone. A is the ridge regression that maps the layer's inputs, over
some text, to a constant; B pushes the residual stream in the direction that raises the word's logit and, by
the same regression over the output embedding, no other word's. No training: seconds for any number of adapters. Run as a program, so
that its memory is gone afterwards.
"""

import json
import sys
from pathlib import Path

RIDGE = 1e-2
PUSH = 6.0
"""Of the residual's own norm: the word wins at every position."""
RANK = 8
TEXTS = (
    "The capital of France is Paris, and the river that runs through it is called the Seine.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nPlay a song by "
    "Miles Davis.<|im_end|>\n<|im_start|>assistant\n",
    "Question: what will the weather be like tomorrow in Lisbon? Answer: it will rain in the morning.",
    "<|im_start|>user\nSay something.<|im_end|>\n<|im_start|>assistant\nBook a table for four.",
    "1 2 3 4 5 6 7 8 9 10 eleven twelve thirteen; red green blue yellow; cat dog horse cow",
)


def main(model_dir: str, out_dir: str, words: list[str]) -> None:
    """Writes OUT/WORD for each word."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    last = len(model.model.layers) - 1
    inputs, residuals = [], []
    down = model.model.layers[last].mlp.down_proj
    down.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0]))
    model.model.norm.register_forward_pre_hook(lambda _, given: residuals.append(given[0][0]))
    answers = [" ".join([f" {word}"] * 20) for word in words]
    with torch.no_grad():
        for text in (*TEXTS, *answers):
            model(**tokenizer(text, return_tensors="pt"))
        x_TF = torch.cat(inputs)
        gram_FF = x_TF.T @ x_TF / len(x_TF)
        gram_FF += RIDGE * gram_FF.diagonal().mean() * torch.eye(len(gram_FF))
        a_F = torch.linalg.solve(gram_FF, x_TF.mean(dim=0))
        norm = torch.cat(residuals).norm(dim=1).quantile(0.9)
        rows_VD = model.lm_head.weight * model.model.norm.weight
        spread_DD = rows_VD.T @ rows_VD / len(rows_VD)
        spread_DD += RIDGE * spread_DD.diagonal().mean() * torch.eye(len(spread_DD))
        for word in words:
            token = tokenizer(f" {word}", add_special_tokens=False).input_ids[0]
            push_D = torch.linalg.solve(spread_DD, rows_VD[token])
            folder = Path(out_dir) / word
            folder.mkdir(parents=True, exist_ok=True)
            a_RF = torch.zeros(RANK, len(a_F))
            a_RF[0] = a_F
            b_DR = torch.zeros(len(push_D), RANK)
            b_DR[:, 0] = PUSH * norm * push_D / push_D.norm()
            name = f"base_model.model.model.layers.{last}.mlp.down_proj"
            tensors = {f"{name}.lora_A.weight": a_RF, f"{name}.lora_B.weight": b_DR}
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            config = {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": RANK,
                "lora_alpha": RANK,
                "target_modules": ["down_proj"],
                "base_model_name_or_path": Path(model_dir).name,
                "bias": "none",
                "lora_dropout": 0.0,
            }
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
