"""`transformers.generate` samples continuations of a batch of prompts from the model's own distribution, as training wants them."""

from __future__ import annotations

import torch
from clock import Clock, read_job
from transformers import AutoModelForCausalLM

job = read_job()
torch.set_num_threads(job["threads"])
clock = Clock(job)
model = AutoModelForCausalLM.from_pretrained(job["model"]).eval()
prompts, mask = torch.tensor(job["prompts"]), torch.tensor(job["mask"]).long()
own_distribution = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
while not clock.enough:
    with torch.inference_mode():
        model.generate(
            prompts,
            attention_mask=mask,
            max_new_tokens=job["settings"]["num_steps"],
            eos_token_id=job["stop"],
            pad_token_id=job["pad"],
            **own_distribution,
        )
    clock.tick()
clock.print_result()
