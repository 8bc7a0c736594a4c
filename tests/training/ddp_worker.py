"""The same training in one process (imported by the test) or as one of several (started by torchrun)."""

import gc
import json
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from training_cases import arguments, lora, make_features, patched

from gistkern.training import Curriculum, GistDataCollator, GistTrainer, Objectives, Stage

GLOBAL_BATCH = 4
CASES = {
    # every parameter must get a gradient in every step, or DDP stops at the next one
    "full": {
        "scheme": "hierarchical",
        "arguments": {"ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False},
    },
    "peft": {"scheme": "segments", "arguments": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}},
    # accelerate has FSDP for accelerators only, so this case says that it runs on one
    "fsdp": {
        "scheme": "hierarchical",
        "arguments": {
            "fsdp": True,
            "fsdp_config": {
                "fsdp_version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            },
        },
    },
}


class Recording(GistDataCollator):
    """Remembers which contexts it collated, by their length and first token."""

    def __call__(self, features):
        self.seen = [*getattr(self, "seen", []), *(tuple(f["context_ids"]) for f in features)]
        return super().__call__(features)


def train(case, folder, processes):
    """One run of `case`; returns what it logged and what this process saw."""
    given = CASES[case]
    if processes == 1:
        given = {**given, "arguments": {k: v for k, v in given["arguments"].items() if not k.startswith("fsdp")}}
    model, handle, segments = patched(given["scheme"])
    model.lm_head.weight.data[7] *= 20  # one token is said often, and half of the answers hold it
    if case == "peft":
        torch.manual_seed(1)
        model = lora(model, init_lora_weights=False).double()
    collate = Recording(0, handle, **segments, teacher=True, cue=[9])
    accumulation = given["arguments"].get("gradient_accumulation_steps", 1)
    settings = arguments(
        folder,
        per_device_train_batch_size=GLOBAL_BATCH // processes // accumulation,
        per_device_eval_batch_size=3,
        save_strategy="steps",
        save_steps=3,
        **given["arguments"],
    )
    if settings.fsdp:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    curriculum = Curriculum([Stage(2, gate=1.0, tokens=(4, 9)), Stage(9, tokens=(4, 20))])
    trainer = GistTrainer(
        model,
        settings,
        data_collator=collate,
        train_dataset=[
            {**feature, "answer_ids": [7] * len(feature["answer_ids"])} if place % 2 else feature
            for place, feature in enumerate(make_features(12))
        ],
        eval_dataset=make_features(6, seed=4),
        objectives=Objectives(answer=1.0, distillation=0.5, reconstruction=0.25),
        curriculum=curriculum,
    )
    trainer.train()
    found = {"seen": collate.seen, "curriculum": curriculum.state_dict(), "eval": trainer.evaluate()}
    asked = make_features(7, seed=5)
    try:
        found["said"] = []
        trainer.evaluate_generation(asked, compute_metrics=lambda one: found["said"].extend(one.predictions) or {})
    except ValueError as error:
        found["said"] = str(error)
    trained = {name: value.detach() for name, value in trainer.model.named_parameters() if value.requires_grad}
    found["sharded"] = [name for name, value in trained.items() if isinstance(value, DTensor)]
    weights = {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in trained.items()}
    if trainer.is_world_process_zero():
        save_file(weights, folder / "weights.safetensors")
    return found


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(make_features(12))


def refusal(folder):
    """What is said to an iterable data set that several processes would share."""
    model, handle, _ = patched()
    try:
        GistTrainer(model, arguments(folder), data_collator=GistDataCollator(0, handle), train_dataset=Stream())
    except ValueError as error:
        return str(error)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {case: train(case, folder / case, processes) for case in CASES}
    found["refusal"] = refusal(folder / "refused")
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    gc.collect()  # a DistributedDataParallel that outlives its process group can wait for it for ever
    torch.distributed.destroy_process_group()
