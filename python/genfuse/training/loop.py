"""The training loop. It knows players and steps, and no kind of model."""

import math
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genfuse._files import warn
from genfuse.data import Batch, Dataset, augmented
from genfuse.errors import NonFiniteLossError, RunError, TrainingWarning
from genfuse.models import GenerativeModel, Player
from genfuse.training.checkpoint import STATE, Checkpoint, load_optimizers, optimizer_tensors
from genfuse.training.lean import Graphed, lean
from genfuse.training.options import Options
from genfuse.training.process import (
    AUGMENTATION,
    NOISE,
    ORDER,
    TEST,
    Progress,
    deferred_interrupts,
    forked_rng,
    generators,
    keep_freed_memory,
    seed_of,
)
from genfuse.training.run import Recorder, Run, differences, essentials

if TYPE_CHECKING:
    from lightning_fabric import Fabric


TEST_EXAMPLES = 10_000  # at most so many of the test split, by chance, are looked at after each epoch
MOMENTS = 8  # of a training, evenly spread, at which samples from the same noise are kept, beside those before it
LAP = 100  # steps, at least, between two looks at held-out data in a training of the usual length
IMAGES, POINTS = 8, 1000  # that are then drawn

Callback = Callable[[dict[str, Any]], Any]  # called with each line of the metrics; True ends the training


class Loop:
    """One training: a model, its players' optimizers, and how far they are.

    ``step`` counts updates. The player of an update, its epoch and its place in the epoch follow from it.
    """

    def __init__(
        self,
        trainer: Options,
        fabric: "Fabric",
        model: GenerativeModel,
        players: list[Player],
        data: Dataset,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.trainer, self.fabric, self.model, self.players = trainer, fabric, model, players
        self.callbacks = callbacks if fabric.is_global_zero else ()
        self.ended = False  # as a callback said, or for want of patience
        self.data = data.to(fabric.device)
        self.trained = {p.name: [w for w in p.parameters if w.requires_grad] for p in players}
        self.optimizers = {p.name: p.optimizer(self.trained[p.name]) for p in players}
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"] if trainer.lr is None else trainer.lr
                group["lr"] = group["base_lr"]
                if trainer.compile == "cuda-graphs":  # which are recorded with the numbers that are not on the device
                    group["capturable"] = True
                    if trainer.schedule != "constant":
                        group["lr"] = torch.tensor(group["lr"], device=fabric.device)
        precision = fabric.strategy.precision
        if precision.precision != "64-true":
            # Fabric would round the data, which a likelihood must see as they are; autocast rounds where it may.
            precision.convert_input = lambda data: data  # type: ignore[method-assign]
        self.precision = precision
        self.scaler = getattr(precision, "scaler", None)
        wrapped, *steppers = fabric.setup(model, *self.optimizers.values())
        wrapped.mark_forward_method("loss")
        for optimizer in self.optimizers.values():
            lean(optimizer)
        alone = fabric.world_size == 1 and not self.scaler  # then Fabric's wrappers only cost time
        self._loss_of = self._loss if alone else wrapped.loss
        self._backward: Callable[[Tensor], Any] = Tensor.backward if alone else fabric.backward
        self._steppers = [*self.optimizers.values()] if alone else steppers
        if trainer.compile == "loss":
            self._loss_of = torch.compile(self._loss_of)

        # Every process takes as many examples of a batch: the few that are too many wait for another epoch's order.
        self.examples = len(data.splits["train"]) // fabric.world_size * fabric.world_size
        self.steps_per_epoch = math.ceil(self.examples / trainer.batch_size)
        self.total = trainer.steps or (trainer.epochs or 0) * self.steps_per_epoch or model.usual_steps
        # Steps between two looks at the splits that are held out, each with a checkpoint.
        self.lap = self.steps_per_epoch
        if not (trainer.steps or trainer.epochs):  # the passes over small data are many and short
            self.lap *= math.ceil(LAP / self.steps_per_epoch)
        self._steps: list[Callable[[Batch], dict[str, Tensor]]] = [
            partial(self._take_step, player) for player in range(len(players))
        ]
        if trainer.compile == "cuda-graphs":
            self._steps = [Graphed(step, trainer.batch_size) for step in self._steps]
        self.turns = [i for i, player in enumerate(players) for _ in range(player.steps)]
        self.step = 0
        self.checkpointed: int | None = None  # the step of the last checkpoint
        self.lowest = math.inf  # the lowest mean loss on the validation split, and the step and weights that had it
        self.best: tuple[int, dict[str, Tensor]] | None = None
        self.waited = 0  # epochs since then
        self.curve: list[tuple[int, float]] = []  # steps, and the loss on the test split after them
        self.recorder: Recorder | None = None
        self.logged: list[dict[str, Any]] = []  # where there is no recorder
        self.essentials: dict[str, Any] | None = None  # what of config.json goes into a checkpoint
        self.pending: list[tuple[int, str, dict[str, Tensor]]] = []  # loss terms since the last look, on the device
        self.snapshot_steps: set[int] = set()  # steps after which samples are kept
        self.warned: set[str] = set()  # what `GenerativeModel.watch` has found

    def run(self, out: Path | None, config: dict[str, Any] | None) -> None:
        """Train to the end, from the last checkpoint in ``out`` if the trainer resumes."""
        torch.manual_seed(seed_of(self.trainer.seed, NOISE, self.fabric.global_rank))
        keep_freed_memory()
        self.model.train()
        self.essentials = config and essentials(config)
        try:
            if out is not None and self.trainer.resume:
                self._load(out)
            if self.step == 0 and type(self.model).prepare is not GenerativeModel.prepare:
                generator = torch.Generator().manual_seed(seed_of(self.trainer.seed, ORDER))
                order = torch.randperm(len(self.data.splits["train"]), generator=generator).to(self.fabric.device)
                with torch.no_grad():
                    self.model.prepare(self.data.batch("train", rows) for rows in order.split(self.trainer.batch_size))
            if out is not None and config is not None:
                self._open(out, config)
            self._run()
        except OSError as error:
            if out is None:
                raise
            raise RunError(
                f"the run {out} stopped at step {self.step}: {error}; {self._last_checkpoint()}, which is whole: when "
                "that is mended, resume the run"
                if self.checkpointed is not None
                else f"the run {out} cannot be written to: {error}"
            ) from error

    def _run(self) -> None:
        if self.recorder and self.trainer.pictures and (self.data.is_image or self.data.shape == (2,)):
            self.snapshot_steps = {round(self.total * k / MOMENTS) for k in range(MOMENTS + 1)}
        interrupt = lambda: 0  # noqa: E731
        try:
            with deferred_interrupts() as interrupt, Progress(self.total, self.step) as self.progress:
                self._train(interrupt)
            if self.step == self.total:
                self._judge()
            if self.best:
                self.model.load_state_dict(self.best[1])
            if self.recorder:
                self.recorder.close()
        finally:
            for weight in chain(*self.trained.values()):
                weight.requires_grad_(True)
            self.model.eval()
            if self.recorder:
                with suppress(OSError):  # it is closed already, or there is another error
                    self.recorder.close()
            if number := interrupt():  # which an error that came after it does not swallow
                if self.recorder and number != signal.SIGINT and self.checkpointed is not None:  # or it ends unsaid
                    said = f"{signal.Signals(number).name}: {self.trainer.out} is saved at step {self.checkpointed}"
                    print(f"genfuse: {said}", file=sys.stderr, flush=True)
                signal.raise_signal(number)
                raise KeyboardInterrupt  # whoever handles the signal otherwise must not take the run for finished

    def _train(self, interrupt: Callable[[], int]) -> None:
        trainer, batch_size = self.trainer, self.trainer.batch_size
        rank, world = self.fabric.global_rank, self.fabric.world_size
        checkpoint_every = trainer.checkpoint_every or self.lap
        names, active = [player.name for player in self.players], None
        self._restart_clock()
        self._keep_samples()
        self.ended = self._impatient()  # a run that is resumed
        seconds = 0.0  # of this lap
        while self.step < self.total and not self.ended:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            generator = torch.Generator().manual_seed(seed_of(trainer.seed, ORDER, epoch))
            order = torch.randperm(len(self.data.splits["train"]), generator=generator)[: self.examples]
            chunks = order.to(self.data.splits["train"].x.device).split(batch_size)[first:]
            batches = self.data.batches("train", (chunk[rank::world] if world > 1 else chunk for chunk in chunks))
            for index, batch in zip(chunks, batches, strict=True):
                name = self.model.turn(self.step, self.total)
                turn = self.turns[self.step % len(self.turns)]
                player = turn if name is None else names.index(self.model.named_player(name))
                if player != active:
                    self._activate(active := player)
                self._update(player, batch)
                self.step += 1
                self.seen += len(index)
                self.progress.step(self.step, epoch + 1)
                self._keep_samples()

                lap_ends = self.step % self.lap == 0 or self.step == self.total
                due = lap_ends or self.step % checkpoint_every == 0
                if due or len(self.pending) >= trainer.log_every or (world == 1 and interrupt()):
                    seconds += self._flush_log()
                    if lap_ends:
                        self._end_lap(seconds)
                        seconds = 0.0
                    ask = interrupt() or self.ended
                    if world > 1:  # that any process got, so that all of them stop at the same step
                        ask = int(self._reduced(torch.tensor(float(ask), device=self.fabric.device), "max"))
                    ends = ask or self.step == self.total
                    if ends or self.step % checkpoint_every == 0:
                        self._save()
                    if ends:
                        return
                    self._restart_clock()

    @cached_property
    def _bandwidth(self) -> Tensor:
        """Standard deviations (D,) of the noise that smooths rows."""
        rows = self.data.splits["train"].x
        return self.trainer.smooth * len(rows) ** (-1 / (rows.shape[1] + 4)) * rows.std(0, correction=0)

    def _update(self, player: int, batch: Batch) -> None:
        name = self.players[player].name
        if self.trainer.flip or self.trainer.shift or self.trainer.smooth:
            generator = torch.Generator()  # by the step, so that a run that is resumed goes on alike
            generator.manual_seed(seed_of(self.trainer.seed, AUGMENTATION, self.step, self.fabric.global_rank))
            if self.trainer.smooth:
                noise = torch.randn(batch.x.shape, generator=generator).to(batch.x)
                x = batch.x + self._bandwidth * noise
            else:
                x = augmented(batch.x, self.trainer.flip, self.trainer.shift, generator)
            batch = Batch(x, self.data.given_of(x) if self.data.task else batch.y)
        if self.trainer.schedule != "constant":
            for group in self.optimizers[name].param_groups:
                lr = group["base_lr"] * self.trainer.factor(self.step, self.total)
                group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr
        self.pending.append((self.step + 1, name, self._steps[player](batch)))

    def _take_step(self, player: int, batch: Batch) -> dict[str, Tensor]:
        """Update a player; returns its loss and the terms. Nothing here may wait for the device."""
        name = self.players[player].name
        optimizer = self.optimizers[name]
        loss, terms = self._loss_of(batch, name)
        self._backward(loss)
        scaler, clip, several = self.scaler, self.trainer.grad_clip, len(self.players) > 1
        if clip is not None or (several and not scaler):  # the balance of players shows in their gradients
            if scaler:
                scaler.unscale_(optimizer)
            gradients = [w.grad for w in self.trained[name] if w.grad is not None]
            norms = torch._foreach_norm(gradients) if gradients else [torch.zeros(())]
            norm = torch.linalg.vector_norm(torch.stack(norms))  # as of get_total_norm, in half its time
            if clip is not None:
                torch.nn.utils.clip_grads_with_norm_(self.trained[name], clip, norm)
            if several and not scaler:  # which lets gradients overflow
                terms = {**terms, "gradient_norm": norm}
        self._steppers[player].step()
        optimizer.zero_grad()
        with torch.no_grad():
            self.model.stepped(name)
        return {"loss": loss.detach(), **{key: term.detach() for key, term in terms.items()}}

    def _loss(self, batch: Batch, player: str) -> tuple[Tensor, dict[str, Tensor]]:
        with self.precision.forward_context():
            return self.model.loss(self.precision.convert_input(batch), player)

    def _activate(self, player: int) -> None:
        """Gradients for one player alone, if there are several."""
        if len(self.players) > 1:
            for weight in chain(*self.trained.values()):
                weight.requires_grad_(False)
            for weight in self.trained[self.players[player].name]:
                weight.requires_grad_(True)

    def _restart_clock(self) -> None:
        self.seen, self.clock = 0, time.perf_counter()

    def _flush_log(self) -> float:
        """Fetch and log the loss terms since the last look: the one place that waits for the device.

        Returns the seconds since the clock was started. Raises NonFiniteLossError.
        """
        fetched = torch.stack([term.float() for _, _, terms in self.pending for term in terms.values()])
        values = iter(self._reduced(fetched, "mean").tolist())
        seconds = time.perf_counter() - self.clock
        losses = [(step, player, {name: next(values) for name in terms}) for step, player, terms in self.pending]
        self.pending = []
        for step, name, terms in losses:
            bad = [term for term, value in terms.items() if not math.isfinite(value)]
            if bad:
                term = next((term for term in bad if term != "loss"), "loss")
                raise NonFiniteLossError(
                    f"the loss is not finite at step {step} (epoch {self._epoch(step)}, player {name}): "
                    f"{term} is {terms[term]}; {self._last_checkpoint()}; {self._suspects(name)}"
                )

        rate = self.seen / seconds
        shown = {}
        for player in self.players:
            if own := [terms for _, name, terms in losses if name == player.name]:
                each = {term: [terms[term] for terms in own if term in terms] for term in dict.fromkeys(chain(*own))}
                means = {term: sum(values) / len(values) for term, values in each.items()}
                lr = float(self.optimizers[player.name].param_groups[0]["lr"])
                self._log("train", {"player": player.name, **means, "lr": lr, "examples_per_second": rate})
                prefix = f"{player.name} " if len(self.players) > 1 else ""
                shown.update({prefix + term: value for term, value in means.items()})
                for name, message in self.model.watch(player.name, self.step, means).items():
                    self._warn(player.name, name, message)
        self.progress.terms(shown, rate)
        return seconds

    def _warn(self, player: str, name: str, message: str) -> None:
        if name not in self.warned:
            self.warned.add(name)
            self._log("warning", {"player": player, "name": name, "message": message})
            if self.fabric.is_global_zero:
                warn(f"step {self.step}: {message}", TrainingWarning)

    def _keep_samples(self) -> None:
        """Put samples from the same noise each time into the run folder, for a picture of how they came about."""
        if self.step not in self.snapshot_steps:
            return
        assert self.recorder
        began = time.perf_counter()
        n = IMAGES if self.data.is_image else POINTS
        given = self.model.some_given(self.data, n)
        self.model.eval()
        with forked_rng(self.fabric.device), torch.no_grad():
            torch.manual_seed(seed_of(self.trainer.seed, TEST))
            generator = torch.Generator(self.model.device).manual_seed(self.trainer.seed)
            self.recorder.keep(self.step, self.model.sample(n, generator=generator, **given))
        self.model.train()
        self.clock += time.perf_counter() - began  # it is no part of the training's speed

    def _end_lap(self, seconds: float) -> None:
        """Log how long the lap took, and the loss on the splits that are held out."""
        if self.recorder or self.callbacks:  # else nobody looks, or another process does
            facts = {"seconds": seconds}
            if self.fabric.device.type == "cuda":
                facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.fabric.device)
            self._log("epoch", facts)
            for player, means in self._evaluate_split("test"):
                self._log("test", {"player": player, **means})
                self.curve.append((self.step, means["loss"]))
        if self.trainer.keeps_best:
            self._validate()

    def _judge(self) -> None:
        """Tell of the loss on the test split whether it was still falling at the end, or had long been rising. That of
        one player against another says neither."""
        if len(self.players) > 1 or len(self.curve) < 5 or not all(math.isfinite(loss) for _, loss in self.curve):
            return
        (lowest_at, lowest), span = min(self.curve, key=lambda point: point[1]), self.curve[0][1]
        span = max(span - lowest, 1e-12)
        name, end = self.players[0].name, self.curve[-1][1]
        before = next(loss for step, loss in self.curve if step >= 0.75 * self.total)
        risen = end - lowest > 0.05 * span
        if risen and not self.best:
            self._warn(name, "overfitting", f"the loss on the test split was lowest at step {lowest_at}, {lowest:.5g}, "
                       f"and has risen to {end:.5g} since: the model learns the training examples by heart. Try fewer "
                       "--steps, --keep best with --data.validation 0.1, a smaller model, or more data")  # fmt: skip
        elif before - end > 0.1 * span and not risen:
            self._warn(name, "improving", f"the loss on the test split was still falling at the end, from {before:.5g} "
                       f"to {end:.5g} in the last quarter: go on by --resume with more --steps")  # fmt: skip

    def _validate(self) -> None:
        """Log the loss on the whole validation split, and remember the weights if none had a lower one."""
        self.waited += 1
        for player, means in self._evaluate_split("validation"):
            self._log("validation", {"player": player, **means})
            loss = float(self._reduced(torch.tensor(means["loss"], device=self.fabric.device), "mean"))
            if loss < self.lowest:  # which NaN is not
                self.lowest, self.waited = loss, 0
                self.best = self.step, {name: value.clone() for name, value in self.model.state_dict().items()}
        self.ended = self.ended or self._impatient()

    def _impatient(self) -> bool:
        """Whether the validation loss has not fallen for as many epochs as the trainer waits."""
        return self.trainer.patience is not None and self.waited >= self.trainer.patience

    @torch.no_grad()
    def _evaluate_split(self, split: str) -> Iterator[tuple[str, dict[str, float]]]:
        """The mean loss terms of each player on a split that is held out, with the same noise every time."""
        count = len(self.data.splits[split])
        chosen = torch.arange(count)
        if split == "test" and count > TEST_EXAMPLES:  # the first ones may all be of one class
            generator = torch.Generator().manual_seed(seed_of(self.trainer.seed, TEST))
            chosen, count = torch.randperm(count, generator=generator)[:TEST_EXAMPLES].sort().values, TEST_EXAMPLES
        rows = max(self.trainer.batch_size, min(1000, 2**21 // math.prod(self.data.shape)))
        self.model.eval()
        with forked_rng(self.fabric.device):
            for player in self.players:
                torch.manual_seed(seed_of(self.trainer.seed, TEST))
                sums: dict[str, Any] = defaultdict(float)
                for start in range(0, count, rows):
                    part = chosen[start : start + rows]
                    loss, terms = self._loss(self.data.batch(split, part), player.name)
                    for name, value in {"loss": loss, **terms}.items():
                        sums[name] += value.double() * len(part)
                yield player.name, {name: float(value) / count for name, value in sums.items()}
        self.model.train()

    def _log(self, split: str, entry: dict[str, Any]) -> None:
        shown = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in entry.items()}
        line = {"step": self.step, "epoch": self._epoch(self.step), "split": split, **shown}
        if self.recorder:
            self.recorder.log(line)
        elif self.trainer.out is None:
            self.logged.append(line)
        for callback in self.callbacks:
            self.ended = callback(dict(line)) is True or self.ended

    def _epoch(self, step: int) -> int:
        """The epoch, from 1, that an update belongs to."""
        return (step - 1) // self.steps_per_epoch + 1

    def _reduced(self, tensor: Tensor, how: str) -> Tensor:
        """The same from every process."""
        reduced = self.fabric.all_reduce(tensor, reduce_op=how)
        assert isinstance(reduced, Tensor)
        return reduced

    def _suspects(self, player: str) -> str:
        """Where numbers that are not finite may have come from: weights, else the first layer that makes some; and of a
        table, the column with the largest value."""
        found = []
        if bad := [name for name, weight in self.model.named_parameters() if not weight.isfinite().all()]:
            found.append(f"weights that are not finite: {', '.join(bad[:3])}" + (", ..." if len(bad) > 3 else ""))
        else:
            layers: list[str] = []

            def look(name: str, module: Any, inputs: Any, out: Any) -> None:
                if name and isinstance(out, Tensor) and not out.isfinite().all():
                    layers.append(name)

            # It is only asked what else there is to say.
            with ExitStack() as stack, suppress(Exception), forked_rng(self.fabric.device), torch.no_grad():
                for name, module in self.model.named_modules():
                    stack.enter_context(module.register_forward_hook(partial(look, name)))
                self._loss(self.data.batch("train", slice(0, self.trainer.batch_size)), player)
            found.append("all weights are finite" + (f", the layer {layers[0]} is not" if layers else ""))
        x = self.data.splits["train"].x
        if len(self.data.shape) == 1:
            largest = x.abs().nan_to_num().amax(0)
            column = int(largest.argmax())
            named = self.data.scaling.names if self.data.scaling else None
            where = named[column] if named else column
            found.append(f"the largest value, {float(largest[column]):.4g}, is in column {where}")
        return "; ".join(found)

    def _check_weights(self) -> None:
        """Raise NonFiniteLossError if a weight is NaN or infinite."""
        if not all(torch.stack([weight.isfinite().all() for weight in self.model.parameters()]).tolist()):
            names = ", ".join(name for name, w in self.model.named_parameters() if not w.isfinite().all())
            raise NonFiniteLossError(
                f"the loss was finite up to step {self.step}, but these weights are not: {names}; "
                f"{self._last_checkpoint()}"
            )

    def _last_checkpoint(self) -> str:
        if self.trainer.out is None:
            return "there is no checkpoint, as the run has no folder"
        return f"the last good checkpoint, of step {self.checkpointed}, is {Path(self.trainer.out) / STATE}"

    def _open(self, out: Path, config: dict[str, Any]) -> None:
        checkpoint = self._checkpoint()
        if self.fabric.is_global_zero:
            if self.trainer.resume:
                self.recorder = Recorder.continued(out, config, checkpoint, self.trainer.keep_checkpoints)
                before = Run(out).metrics()
                self.curve = [(entry["step"], entry["loss"]) for entry in before if entry["split"] == "test"]
            else:
                self.recorder = Recorder.begin(out, config, checkpoint, self.trainer.keep_checkpoints)
        self.checkpointed = self.step

    def _save(self) -> None:
        if self.trainer.out is None:
            self._check_weights()
        if self.trainer.out is None or self.checkpointed == self.step:
            return
        checkpoint = self._checkpoint()
        if self.recorder:
            self.recorder.save(checkpoint)
        self.checkpointed = self.step

    def _checkpoint(self) -> Checkpoint:
        """All that `_load` needs. Raises NonFiniteLossError if a weight is NaN or infinite."""
        self._check_weights()
        tensors, scalars = optimizer_tensors(self.optimizers)
        for kind, generator in generators(self.fabric.device).items():
            state = generator.get_rng_state()
            rows = torch.zeros(self.fabric.world_size, len(state), dtype=state.dtype, device=self.fabric.device)
            rows[self.fabric.global_rank] = state
            tensors[f"generator.{kind}"] = self._reduced(rows, "sum")
        facts = {
            "step": self.step,
            "processes": self.fabric.world_size,
            "scalars": scalars,
            "scaler": self.precision.state_dict(),
            "warned": sorted(self.warned),
        }
        if self.essentials:
            facts["config"] = self.essentials
        if self.best:
            facts["best"] = {"step": self.best[0], "loss": self.lowest, "waited": self.waited}
        return Checkpoint(self.model.state_dict(), tensors, facts, self.best[1] if self.best else {})

    def _load(self, path: Path) -> None:
        checkpoint = Checkpoint.newest(path)
        processes = checkpoint.facts["processes"]
        if processes != self.fabric.world_size:
            raise RunError(
                f"the run {path} cannot be resumed with another number of processes: was {processes}, "
                f"now {self.fabric.world_size}"
            )
        self.step = checkpoint.facts["step"]
        if self.step > self.total:
            epochs = "" if self.trainer.steps else f" of {self.trainer.epochs} epochs"
            raise RunError(
                f"the run {path} has trained {self.step} steps, more than the {self.total}{epochs}: "
                f"resume it with more {'epochs' if epochs else 'steps'}"
            )
        try:
            wanted = self.essentials or {}
            if found := differences(checkpoint.facts.get("config", wanted), wanted):
                raise RunError(
                    f"the run {path} cannot be resumed: its config.json was edited or is damaged, and does not fit its "
                    f"{STATE}: {'; '.join(found)}"
                )
            self._take(checkpoint)
        except RunError:
            raise
        except Exception as error:  # of a state that somebody made up
            raise RunError(
                f"{path / STATE} does not fit the run: {type(error).__name__}: {error}".rstrip(": ")
            ) from error

    def _take(self, checkpoint: Checkpoint) -> None:
        self.model.load_state_dict(checkpoint.weights)
        self.precision.load_state_dict(checkpoint.facts["scaler"])
        self.warned = set(checkpoint.facts.get("warned", ()))  # a run may be older than that
        if checkpoint.best:
            best = checkpoint.facts["best"]
            self.best, self.lowest = (best["step"], checkpoint.best), best["loss"]
            self.waited = best.get("waited", 0)  # a run may be older than that
        load_optimizers(self.optimizers, self.trained, checkpoint)
        for kind, generator in generators(self.fabric.device).items():
            if f"generator.{kind}" in checkpoint.others:  # a run may go on on another device
                row = checkpoint.others[f"generator.{kind}"][self.fabric.global_rank]
                generator.set_rng_state(row.clone())  # of a view, torch reads the wrong bytes
