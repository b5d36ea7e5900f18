"""The BERT router's training proper, by transformers' Trainer, in this process or in several that it is started in.

Everything it needs lies in a work folder: ``task.json``, links to the encoder's files, its checkpoints, and at the end the
trained encoder. Where that folder may be lost with its machine, checkpoints are copied to a store now and then. They hold the
optimizer's and the generators' state as torch pickles (read back with torch's restricted unpickler); the same training alone
reads them, and they are no part of what is published.

Fixed by the seed: the head's first values, dropout, and the order of the queries. Not fixed: the order in which a device
adds; two trainings agree to rounding on one machine and may drift apart on different ones.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch.utils.data import Dataset, Sampler, Subset
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback, TrainerCallback

from router_training.batches import Collator, PartOrder, Parts
from router_training.encoders import longest
from router_training.keeping import WHOLE, Keeper, last_whole
from router_training.processes import end_with_parent, say
from serving.encoder import EncoderScorer, quiet, save_encoder
from storage.atomic import canonical_json, sync, write_atomically
from storage.errors import ChannelMergingError, CheckpointError, ClusterError, RecipeError, StoreError
from storage.stores import open_store

TASK = "task.json"
ENCODER = "encoder"
CHECKPOINTS = "checkpoints"
TRAINED = "trained"
RECORD = "encoder.json"
"""In the trained folder, written last: what router.json says of the encoder."""
PER_EPOCH = 10
"""Checkpoints, and with an early stop evaluations, per epoch."""
EVALUATED = 2048
"""Validation queries that an evaluation reads: the first, which are a random sample."""
BETAS = (0.9, 0.95)
WAITED_S = 6 * 3600
"""Others wait while one process copies a checkpoint. One that dies ends all at once, by ``run_together``."""

Tell = Callable[[str], None]


class _Trainer(Trainer):
    """With the order of queries that preparation's parts allow."""

    order: Sampler[int] | None = None

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[Any] | None:
        return self.order


class _Progress(TrainerCallback):
    """Tells how far it is, keeps the epoch's order, marks checkpoints that are whole, stops at a loss that is no number."""

    def __init__(self, order: PartOrder, folder: Path, tell: Tell, keeper: Keeper | None) -> None:
        self.order, self.folder, self.tell, self.keeper = order, folder, tell, keeper

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        best = self.folder / f"checkpoint-{state.best_global_step}"
        if best.is_dir():  # the Trainer knows it by the folder that it was made in, which may have been another one
            state.best_model_checkpoint = str(best)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.order.epoch = int(state.epoch or 0)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **others: Any) -> None:
        logs = logs or {}
        loss, validation = logs.get("loss"), logs.get("eval_loss")
        if any(found is not None and not math.isfinite(found) for found in (loss, validation)):
            raise RecipeError(
                f"router.learning_rate: after {state.global_step} of {state.max_steps} updates the BERT router's loss is no "
                f"number. Lower the rate ({args.learning_rate:g}) or raise router.warmup."
            )
        if state.is_world_process_zero and (loss is not None or validation is not None):
            found = f"loss {loss:.4f}" if loss is not None else f"validation loss {validation:.4f}"
            self.tell(f"update {state.global_step} of {state.max_steps}, {found}")

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.is_world_process_zero:
            checkpoint = self.folder / f"checkpoint-{state.global_step}"
            mark_whole(checkpoint)
            if self.keeper is not None:
                best = state.best_model_checkpoint
                wanted = [Path(best), checkpoint] if best and Path(best) != checkpoint else [checkpoint]
                try:
                    self.keeper.keep(wanted)  # the best first: the last one is of no use without it
                except StoreError as error:
                    self.tell(f"{error} A checkpoint was not copied; the training goes on.")


def mark_whole(checkpoint: Path) -> None:
    """Make a checkpoint's files durable and list them in its marker."""
    files = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.is_file()}
    for name in files:
        sync(checkpoint / name)
    write_atomically(checkpoint / WHOLE, canonical_json(files))


def precision() -> dict[str, Any]:
    """bf16 on devices that compute with it, fp16 on older GPUs, float32 on CPUs."""
    if not torch.cuda.is_available():
        return {}
    return {"bf16": True} if torch.cuda.is_bf16_supported(including_emulation=False) else {"fp16": True}


def mean_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Cross entropy, over all queries of an update: how it is cut into forward passes does not matter."""
    logits = (outputs["logits"] if isinstance(outputs, dict) else outputs[0]).float()
    total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    mean: torch.Tensor = total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
    return mean


def build(folder: Path, experts: list[str], place: str) -> Any:
    """The encoder with a new head for these experts, in float32. CheckpointError when its weights are not its own."""
    labels = dict(enumerate(experts))
    with quiet():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config.update(
            {
                "num_labels": len(experts), "id2label": labels, "label2id": {name: label for label, name in labels.items()},
                "problem_type": "single_label_classification",
            }
        )  # fmt: skip
        try:
            model, found = AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True,
                local_files_only=True, trust_remote_code=False, output_loading_info=True,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"router.encoder: {place}: its weights cannot be read ({reason}). Save it again.") from None
    prefix = f"{model.base_model_prefix}."
    other = [key if isinstance(key, str) else key[0] for key in (*found["missing_keys"], *found["mismatched_keys"])]
    lacking = sorted(key for key in other if key.startswith(prefix) and ".pooler." not in f".{key}")
    if lacking:
        raise CheckpointError(
            f"router.encoder: {place}: {len(lacking)} tensors of the encoder are not in its weights, or not in the shapes "
            f"of its config.json ({', '.join(lacking[:3])}). Save the whole encoder again."
        )
    return model


def arguments(task: Mapping[str, Any], work: Path, steps: int) -> TrainingArguments:
    """The recipe's settings, and what is fixed, as the Trainer takes them. ``steps``: updates per epoch."""
    settings, world = task["settings"], int(os.environ.get("WORLD_SIZE", "1"))
    passes = settings["accumulate"] * world
    every = max(1, steps // PER_EPOCH)
    on_cpu = not torch.cuda.is_available()
    evaluated: dict[str, Any] = {}
    if settings["early_stop"] is not None:
        evaluated = {
            "eval_strategy": "steps", "eval_steps": every, "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss", "greater_is_better": False,
        }  # fmt: skip
    return TrainingArguments(
        output_dir=str(work / CHECKPOINTS), num_train_epochs=settings["epochs"], learning_rate=settings["learning_rate"],
        per_device_train_batch_size=settings["batch"] // passes, per_device_eval_batch_size=max(1, settings["batch"] // passes),
        gradient_accumulation_steps=settings["accumulate"],
        optim="adamw_torch", adam_beta1=BETAS[0], adam_beta2=BETAS[1], weight_decay=settings["weight_decay"], max_grad_norm=1.0,
        lr_scheduler_type="linear", warmup_steps=math.ceil(settings["warmup"] * steps * settings["epochs"]),
        save_strategy="steps", save_steps=every, save_total_limit=2, restore_callback_states_from_checkpoint=True,
        logging_strategy="steps", logging_steps=every, logging_nan_inf_filter=False,
        log_level="error", log_level_replica="error", disable_tqdm=True, report_to="none",
        seed=task["seed"] % 2**32, data_seed=task["seed"] % 2**32,
        use_cpu=on_cpu, ddp_backend="gloo" if on_cpu and world > 1 else None, ddp_timeout=WAITED_S,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False, label_names=["labels"], **precision(), **evaluated,
    )  # fmt: skip


def fit(work: Path, tell: Tell) -> None:
    """Train what ``task.json`` says, on from the last whole checkpoint, and leave the encoder in the trained folder.

    ClusterError when the device has too little memory for the batch, RecipeError when the loss is no number.
    """
    found = json.loads((work / TASK).read_bytes())
    task, parts = found["identity"], found["parts"]
    settings, experts, is_first = task["settings"], task["experts"], int(os.environ.get("RANK", "0")) == 0
    queries, validation = (Parts([Path(path) for path in parts[which]]) for which in ("train", "validation"))
    steps = math.ceil(len(queries) / settings["batch"])
    options = arguments(task, work, steps)  # which joins the other processes
    options._n_gpu = min(1, options.n_gpu)  # it would spread an update over all GPUs in threads, with more queries each
    keeper = Keeper(open_store(found["kept"]), found["keep_every"]) if found["kept"] and is_first else None
    if keeper is not None:
        keeper.restore(work / CHECKPOINTS)
    checkpoint = _from_first(last_whole(work / CHECKPOINTS) if is_first else None, options)
    transformers.set_seed(options.seed)
    model = build(work / ENCODER, experts, task["source"])
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(work / ENCODER, local_files_only=True, trust_remote_code=False)
    max_length = min(settings["max_length"], longest(model, tokenizer))
    order = PartOrder(queries.counts, task["seed"])
    trainer = _Trainer(
        model=model, args=options, train_dataset=queries, compute_loss_func=mean_loss,
        data_collator=Collator(tokenizer, max_length, 8 if torch.cuda.is_available() else None),
        eval_dataset=Subset(validation, range(min(EVALUATED, len(validation)))) if settings["early_stop"] is not None else None,
        callbacks=[_Progress(order, work / CHECKPOINTS, tell, keeper)],
    )  # fmt: skip
    trainer.order = order
    trainer.remove_callback(PrinterCallback)
    if settings["early_stop"] is not None:
        trainer.add_callback(EarlyStoppingCallback(settings["early_stop"]))
    if checkpoint is not None and is_first:
        tell(f"goes on from update {checkpoint.name.rpartition('-')[2]}")
    try:
        with quiet():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    except torch.OutOfMemoryError as error:
        at_once = options.per_device_train_batch_size
        raise ClusterError(  # not the recipe's fault alone: others may hold the device's memory
            f"router.accumulate: {at_once} queries of up to {max_length} tokens at once do not fit the device's memory "
            f"({' '.join(str(error).split())[:150]}). Set it to {2 * settings['accumulate']}, or lower router.max_length."
        ) from None
    if is_first:
        scorer = EncoderScorer(experts, trainer.model, tokenizer, max_length, source=task["source"])
        trained = work / TRAINED
        shutil.rmtree(trained, ignore_errors=True)
        save_encoder(scorer, trained)
        write_atomically(trained / RECORD, canonical_json({"experts": experts, "encoder": scorer.describe()}))


def _from_first(checkpoint: Path | None, options: TrainingArguments) -> Path | None:
    """What the first of several processes found, once it has tidied up."""
    if options.world_size == 1:
        return checkpoint
    found: list[Path | None] = [checkpoint]
    torch.distributed.broadcast_object_list(found, src=0, device=options.device)
    return found[0]


def main() -> None:
    """One of the processes of a training."""
    end_with_parent()
    try:
        fit(Path(sys.argv[1]), lambda text: say(tell=text))
    except ChannelMergingError as error:
        say(error=type(error).__name__, text=str(error))
        sys.exit(1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
