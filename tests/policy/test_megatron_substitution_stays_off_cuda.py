"""What Megatron-Core needs on a CPU: nothing of it where there is CUDA, nothing for another version, once otherwise."""

import multiprocessing

EXPECTED = {
    "torch.cuda": {
        "current_device",
        "Stream",
        "stream",
        "current_stream",
        "synchronize",
        "manual_seed",
        "get_rng_state",
        "_megatron_vespo_on_cpu",
    },
    "torch.Tensor": {"cuda"},
    "megatron.core.utils": {"torch"},
    "megatron.core.pipeline_parallel.schedules": {"torch"},
    "megatron.core.optimizer.clip_grads": {"torch"},
    "megatron.core.optimizer.optimizer": {"torch", "clip_grad_by_total_norm_fp32"},
    "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params": {"__init__"},
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer": {"__init__"},
    "megatron.core.tensor_parallel.mappings": {"_gather_along_first_dim", "_reduce_scatter_along_first_dim"},
    "megatron.core.tensor_parallel.random": {"_get_cuda_rng_state", "_set_cuda_rng_state"},
    "megatron.core.transformer.moe.moe_utils": {"te_general_gemm"},
    "megatron.core.transformer.moe.token_dispatcher": {"maybe_move_tensor_to_cpu"},
}


def install_step_by_step(answers):
    """In a fresh interpreter, where nothing is installed yet."""
    import sys

    import megatron.core
    import torch
    from megatron.core.optimizer import distrib_optimizer, optimizer

    from megatron_vespo.policy import megatron_on_cpu

    def attributes():
        places = {
            name: module for name, module in sys.modules.items() if name == "torch" or name.startswith("megatron.core")
        }
        places |= {"torch.cuda": torch.cuda, "torch.Tensor": torch.Tensor, "torch.nn.Module": torch.nn.Module}
        for module, kind in (
            (optimizer, "Float16OptimizerWithFloat16Params"),
            (distrib_optimizer, "DistributedOptimizer"),
        ):
            places[f"{module.__name__}.{kind}"] = getattr(module, kind)
        return {name: {key: id(value) for key, value in vars(place).items()} for name, place in places.items()}

    def changes(before):
        after = attributes()
        changed = {
            name: {key for key, value in values.items() if before[name].get(key) != value}
            for name, values in after.items()
            if name in before
        }
        return {name: keys for name, keys in changed.items() if keys}

    before = attributes()
    said = {"under_cuda": (megatron_on_cpu.install(cuda_available=True), changes(before), megatron_on_cpu.installed())}
    version, megatron.core.__version__ = megatron.core.__version__, "0.17.0"
    refused = ""
    try:
        megatron_on_cpu.install(cuda_available=False)
    except megatron_on_cpu.UnsupportedMegatronVersion as error:
        refused = str(error)
    megatron.core.__version__ = version
    said["other_version"] = (refused, changes(before))
    said["on_cpu"] = (megatron_on_cpu.install(cuda_available=False), changes(before), megatron_on_cpu.installed())
    again = attributes()
    said["twice"] = (megatron_on_cpu.install(cuda_available=False), changes(again))
    answers.put(said)


def test_what_is_substituted_and_when():
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=install_step_by_step, args=(answers,))
    process.start()
    said = answers.get(timeout=120)
    process.join()
    assert said["under_cuda"] == (False, {}, False)
    refused, changed = said["other_version"]
    assert "0.17.0" in refused
    assert "megatron-core==0.16.1" in refused
    assert changed == {}
    assert said["on_cpu"] == (True, EXPECTED, True)
    assert said["twice"] == (False, {})
