"""The number of the epoch reaches the shuffling and the data, in every process, its workers, and a resumed run."""

import numpy as np
from transformers import TrainerCallback


def set_epoch(loader, epoch: int):
    """Tell a data loader's samplers and data set which pass over the data begins; call it before `iter(loader)`.

    Accelerate's own `DataLoaderShard.set_epoch` stops at the first of them that it finds: with several processes, and
    after `skip_first_batches`, the data set is never told, and augmentation repeats the pixels of epoch 0.

    Args:
        loader: of torch or Accelerate; what wraps samplers (`batch_sampler`, `sampler`) or data sets (`dataset`,
            `datasets`) is looked through.
        epoch: 0 or more.
    """
    for start, inner in ((loader, ("batch_sampler", "sampler")), (loader.dataset, ("dataset", "datasets"))):
        seen, waiting = {id(loader)}, [start]
        while waiting:
            part = waiting.pop()
            if part is not loader and hasattr(part, "set_epoch"):
                part.set_epoch(epoch)  # which tells what it wraps
                continue
            for name in inner:
                found = getattr(part, name, None)
                for entry in found if isinstance(found, list | tuple) else [found]:
                    if entry is not None and id(entry) not in seen:
                        seen.add(id(entry))
                        waiting.append(entry)


class EpochReachesData(TrainerCallback):
    """`set_epoch` at the start of every epoch of a Trainer, counted by optimizer steps and so right after a resume.

    A stream without a length begins to count where training begins.
    """

    def __init__(self):
        self._passes = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._passes = 0

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        try:
            steps = -(-len(train_dataloader) // args.gradient_accumulation_steps)
            epoch = state.global_step // steps
        except TypeError:  # of a stream
            epoch = self._passes
        self._passes += 1
        set_epoch(train_dataloader, epoch)
        generator = getattr(train_dataloader, "generator", None)
        if generator is not None:  # of the seeds of its workers
            numbers = np.random.SeedSequence([args.seed, epoch, args.process_index]).generate_state(1, np.uint64)
            generator.manual_seed(int(numbers[0]))
