"""The smoke preset, its model in parts on two processes (FSDP2), as accelerate does it on accelerators."""

import sys
from dataclasses import replace
from pathlib import Path

from accelerate import DistributedType, PartialState
from conftest import smoke

import passkey.training

FSDP = {
    "fsdp_version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "state_dict_type": "FULL_STATE_DICT",
}
made = passkey.training.training_arguments


def as_on_an_accelerator(*given):
    """accelerate has FSDP for accelerators only: say that this is one."""
    found = made(*given)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return found


passkey.training.training_arguments = as_on_an_accelerator
settings = smoke()
settings = replace(settings, training={**settings.training, "fsdp": "full_shard", "fsdp_config": FSDP})
passkey.training.train(settings, Path(sys.argv[1]), resume="--resume" in sys.argv)
