"""All habits by name."""

from tests.multiprocess.habits import (
    dcgan,
    distillation,
    lora,
    metric_subclass,
    seq2seq,
    simclr,
    task,
    transfer,
    two_tower,
    vae,
    wgan_gp,
    wide_and_deep,
)

HABITS = {
    module.__name__.rpartition(".")[2]: module.main
    for module in (
        dcgan,
        distillation,
        lora,
        metric_subclass,
        seq2seq,
        simclr,
        task,
        transfer,
        two_tower,
        vae,
        wgan_gp,
        wide_and_deep,
    )
}
