"""One run: everything that defines it, validated."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from peer_scaling.checkpoint import CheckpointConfig
from peer_scaling.claims import ClaimConfig
from peer_scaling.cost import Cost
from peer_scaling.data import MAX_SEED, DataConfig
from peer_scaling.errors import check
from peer_scaling.evaluate import EvalConfig
from peer_scaling.ffw.base import FFWConfig
from peer_scaling.kernels.dispatch import BACKENDS
from peer_scaling.model import Decoder, DecoderConfig, build_model, model_cost
from peer_scaling.optim import OptimConfig, peak_lr
from peer_scaling.parallel import PARALLEL
from peer_scaling.paths import NAME, NAME_RULE
from peer_scaling.track import TrackerConfig

PRECISIONS = ("float32", "bfloat16")
AUTO = "auto"


@dataclass(frozen=True)
class Settings:
    """What a run has beside its model, data, optimiser, evaluation and tracker."""

    budget: float
    """Training FLOPs."""
    study: str = "default"
    variant: str = ""
    """Label in figures and tables; by default the name of the feed-forward."""
    seed: int = 0
    """Seed of the initial weights."""
    batch_size: int = 4
    """Sequences per optimiser step, of all devices together."""
    micro_batch: int | Literal["auto"] | None = None
    """Sequences per forward pass, of all devices together; by default all of a step. `auto`: as
    many as fit (memory.py)."""
    precision: str = "float32"
    """`float32`, or `bfloat16` for autocast."""
    compile: bool = False
    activation_checkpointing: bool = False
    """Compute attention and dense feed-forwards again in the backward pass: less memory, the same
    bits."""
    deterministic: bool = False
    """Refuse operations whose result may differ from one execution to the next."""
    kernels: str = "auto"
    """What computes the sparse layers: a name in `peer_scaling.kernels.dispatch`."""
    device: str = "auto"
    """`auto` (a GPU if there is one), or a name that PyTorch knows."""
    threads: int | None = None
    """CPU threads; by default PyTorch's choice."""
    parallel: str = "ddp"
    """What several processes (torchrun) do with the model: a name in `peer_scaling.parallel`."""
    rank_timeout_seconds: float = 600.0
    """How long one of them waits for another before it fails."""
    runs_dir: str = "runs"
    save_model: bool = True
    log_lines: int = 100
    """Lines of `history.jsonl` per run, at least."""
    progress: str = "auto"
    """`bar`, `lines`, `off`, or `auto`: a bar on a terminal, lines elsewhere."""
    dry_run: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} must be positive"
            for name in (
                "batch_size",
                "micro_batch",
                "threads",
                "log_lines",
                "budget",
                "rank_timeout_seconds",
            )
            if getattr(self, name) not in (None, AUTO) and not getattr(self, name) > 0
        ]
        micro_batch = self.micro_batch
        if micro_batch and micro_batch != AUTO and self.batch_size % micro_batch:
            problems.append(f"micro_batch={self.micro_batch} does not divide {self.batch_size}")
        if not 0 <= self.seed < MAX_SEED:
            problems.append(f"seed={self.seed} must be in [0, 2^63)")
        if self.kernels not in BACKENDS:
            problems.append(f"kernels={self.kernels!r} is unknown; use {', '.join(BACKENDS)}")
        if self.parallel not in PARALLEL:
            problems.append(f"parallel={self.parallel!r} is unknown; use {', '.join(PARALLEL)}")
        if self.precision not in PRECISIONS:
            problems.append(f"precision={self.precision!r} is unknown; use {', '.join(PRECISIONS)}")
        if self.progress not in ("auto", "bar", "lines", "off"):
            problems.append(f"progress={self.progress!r} is unknown; use auto, bar, lines, off")
        if not NAME.fullmatch(self.study):
            problems.append(f"study={self.study!r} must be the name of a folder: {NAME_RULE}")
        if self.variant and not NAME.fullmatch(self.variant):
            problems.append(f"variant={self.variant!r} must be a label: {NAME_RULE}")
        if not self.runs_dir or not self.runs_dir.isprintable():
            problems.append(f"runs_dir={self.runs_dir!r} must be the path of a folder")
        check(problems)


@dataclass(frozen=True)
class Run:
    """Everything that defines a run, validated; the last form that knows of a configuration."""

    settings: Settings
    ffw_name: str
    ffw: FFWConfig
    decoder: DecoderConfig
    data: DataConfig
    optim: OptimConfig
    eval: EvalConfig
    tracker: TrackerConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    claim: ClaimConfig = field(default_factory=ClaimConfig)
    chosen_micro_batch: int | None = None
    """What `micro_batch=auto` came to; None before that is known, and for a number or null."""

    @property
    def variant(self) -> str:
        """Label of the variant."""
        return self.settings.variant or self.ffw_name

    @property
    def size(self) -> str:
        """Name of the backbone, by shape."""
        return f"d{self.decoder.d_model}_l{self.decoder.num_layers}"

    @property
    def forward_sequences(self) -> int:
        """Sequences per forward pass, in training and in evaluation; with `micro_batch=auto`, all
        of a step until a number is chosen.
        """
        asked = self.settings.micro_batch
        number = self.chosen_micro_batch if asked == AUTO else asked
        return number or self.settings.batch_size

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimiser step."""
        return self.settings.batch_size * self.data.context

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return peak_lr(self.optim, self.decoder.d_model)

    @property
    def study_folder(self) -> Path:
        """Folder of the study's runs."""
        return Path(self.settings.runs_dir) / self.settings.study

    def model(self) -> Decoder:
        """A new model with its initial weights, on the CPU."""
        return build_model(
            self.decoder,
            self.ffw,
            self.data.tokenizer.vocab_size,
            self.data.context,
            self.settings.seed,
            activation_checkpointing=self.settings.activation_checkpointing,
        )

    def cost(self) -> Cost:
        """Cost of the model per token."""
        vocab_size = self.data.tokenizer.vocab_size
        return model_cost(self.decoder, self.ffw, vocab_size, self.data.context)

    @property
    def ffw_settings(self) -> dict[str, Any]:
        """The variant's name and numbers, as plain values."""
        return {"name": self.ffw_name, **self.ffw.numbers()}

    def describe(self) -> dict[str, Any]:
        """The whole configuration as plain values, for records and trackers."""
        return {
            **asdict(self.settings),
            "micro_batch": self.chosen_micro_batch or self.settings.micro_batch,
            "micro_batch_chosen": self.chosen_micro_batch is not None,
            "variant": self.variant,
            "ffw": self.ffw_settings,
            "size": self.size,
            "decoder": asdict(self.decoder),
            "data": asdict(self.data),
            "optim": {**asdict(self.optim), "lr": self.lr},
            "eval": asdict(self.eval),
            "tracker": asdict(self.tracker),
            "checkpoint": asdict(self.checkpoint),
            "claim": asdict(self.claim),
        }
