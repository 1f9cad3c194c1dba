"""Every setting of a run as typed dataclasses; the docstring under a field is its documentation."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class FreezeConfig:
    vision: bool = False
    """Keep the ViT (patch embedding, positions, vision layers) as it is; the merger still trains."""
    merger: bool = False
    """Keep the merger and the DeepStack mergers as they are."""
    language: bool = False
    """Keep the embedding, the decoder layers and the head as they are."""


@dataclass
class RecomputeConfig:
    vision: int = 0
    """Number of vision layers of a stage, counted from its first, whose activations are recomputed; -1 means all."""
    language: int = 0
    """Number of decoder layers of a stage, counted from its first, whose activations are recomputed; -1 means all."""


@dataclass
class ModelConfig:
    hf_path: str = ""
    """Hugging Face folder with `config.json`; tokenizer and processor files are read from here too."""
    dtype: str = "bf16"
    """`bf16` (fp32 main weights and fp32 gradient reduction) or `fp32`."""
    layers: str = "auto"
    """Layer implementation: `local` (torch SDPA), `transformer_engine`, or `auto` (what the platform offers)."""
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)


@dataclass
class ParallelConfig:
    tp_size: int = 1
    """Tensor-parallel degree of ViT and LLM."""
    pp_size: int = 1
    """Pipeline-parallel degree."""
    layout: str = ""
    """Block layout, e.g. `P v*20 | v*12 M E t*4 | t*12 | t*12 L`; empty = ViT and text spread by parameter count.
    The number of slices is pp_size, or a multiple of it for interleaved 1F1B."""
    sequence_parallel: bool = False
    """Split the token dimension of norms and residuals over the tensor-parallel group."""
    overlap_grad_reduce: bool = True
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = True
    """Gather updated parameters while the next forward pass already runs (distributed optimizer only)."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over the data-parallel group."""
    timeout_minutes: float = 10.0
    """A collective that takes longer fails, and with it the run."""


@dataclass
class PlatformConfig:
    name: str = "auto"
    """`cpu`, `cuda`, `musa` or a registered plug-in; `auto` = the one accelerator present, else cpu."""
    threads_per_rank: int = 0
    """Intra-op CPU threads of a rank; 0 = cores of the machine / ranks on it."""


@dataclass
class KernelsConfig:
    mrope: str = "auto"
    """Rotary embedding, with QK-norm and without: `triton`, `torch`, or `auto` (the best that can run here)."""
    window_attention: str = "auto"
    """Windowed attention of the ViT: `triton`, `torch` or `auto`."""
    varlen_attention: str = "auto"
    """Attention over packed sequences of the local layers: `flash_attn_3`, `flash_attn`, `torch_varlen`,
    `transformer_engine`, `torch` (SDPA) or `auto`."""
    dynamic_padding: str = "auto"
    """Row gather and scatter between ViT and language model: `triton`, `torch` or `auto`."""


@dataclass
class DataConfig:
    train: list[str] = field(default_factory=list)
    """jsonl files of conversations to train on."""
    evaluation: list[str] = field(default_factory=list)
    """jsonl files of held-out conversations."""
    media_root: str = ""
    """Folder that relative image and video paths start from; empty = the folder of the jsonl file."""
    tokenizer: str = ""
    """A sentencepiece `.model` file, or a folder with a Hugging Face tokenizer; empty = `model.hf_path`."""
    chat_template: str = ""
    """A Jinja file with the chat template; empty = the tokenizer's own, else ChatML."""
    system_prompt: str = "You are a helpful assistant."
    """Used when a conversation brings no system turn; empty = none."""
    seq_length: int = 4096
    """Tokens of one micro-batch (several samples are packed into it) and the limit of one sample."""
    max_patches: int = 16384
    """Vision patches of one micro-batch and the limit of one sample."""
    padding: str = "auto"
    """`buckets` pads micro-batches to a few sizes so that device memory is reused, the first step to the largest;
    `none` does not; `auto` = buckets where the platform caches device memory (not on cpu). Losses do not change."""
    padding_buckets: int = 8
    """Sizes of text and of vision that micro-batches are padded to."""
    global_batch_size: int = 64
    """Samples per optimizer step, over all data-parallel ranks."""
    min_pixels: int = 0
    """Smallest image area after resizing; 0 = the processor's own."""
    max_pixels: int = 0
    """Largest image area after resizing; 0 = the processor's own."""
    video_fps: float = 2.0
    """Frames per second sampled from a video file."""
    max_video_frames: int = 64
    """Most frames sampled from one video."""
    shuffle: bool = True
    """Draw samples in a new random order each epoch; false = file order."""
    verify: str = "header"
    """Check of the media before the first step: `header` (sizes), or `decode` (every pixel)."""
    prefetch_steps: int = 2
    """Steps that are prepared ahead of the one that runs."""
    decode_threads: int = 2
    """Threads that decode images on a rank that needs pixels."""


@dataclass
class OptimizerConfig:
    lr: float = 1e-5
    """Peak learning rate of the language model."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    vision_lr_ratio: float = 1.0
    """Factor on maximum and minimum learning rate of the ViT."""
    merger_lr_ratio: float = 1.0
    """Factor on maximum and minimum learning rate of the mergers."""
    weight_decay: float = 0.1
    """Not applied to biases, norms and one-dimensional parameters."""
    beta1: float = 0.9
    """Decay of the running mean of the gradient."""
    beta2: float = 0.999
    """Decay of the running mean of the squared gradient."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""


@dataclass
class ScheduleConfig:
    train_steps: int = 0
    """Optimizer steps of the run; 0 = `epochs` passes over the data."""
    epochs: float = 1.0
    """Passes over the training data when train_steps is 0."""
    decay: str = "cosine"
    """`cosine`, `linear` or `constant`."""
    warmup_ratio: float = 0.01
    """Share of the steps with a linearly rising learning rate."""
    eval_every: int = 0
    """Steps between evaluations; 0 = only at the end."""
    eval_at_start: bool = False
    """Evaluate the first weights of a new run too."""


@dataclass
class CheckpointConfig:
    dir: str = ""
    """Folder of the checkpoints; empty = `<run_dir>/checkpoints`."""
    init: str = ""
    """What a new run starts from: a checkpoint made by `rb convert import`, or a Hugging Face folder;
    empty = `model.hf_path`. `random` draws fresh weights, and must be asked for by name."""
    resume: bool = True
    """Continue from the newest complete checkpoint of the run, when there is one."""
    save_every: int = 500
    """Steps between checkpoints; 0 = only at the end."""
    keep_last: int = 2
    """Complete checkpoints that are kept; 0 = all."""
    asynchronous: bool = True
    """Write in the background while training goes on."""


@dataclass
class MetricsConfig:
    log_every: int = 1
    """Steps between log lines."""
    progress: bool = True
    """Show a progress bar on rank 0."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    plots: bool = True
    """Write a PNG of the curves into the run folder."""


@dataclass
class TaskConfig:
    name: str = "sft"
    """What is trained: `sft`."""


@dataclass
class ClusterConfig:
    name: str = "local"
    """Where the processes start: `local`."""
    num_nodes: int = 1
    """Machines of the run; `rb launch` starts the processes of one."""
    processes_per_node: int = 0
    """0 = what the parallel sizes need (`world_size`)."""
    master_addr: str = "127.0.0.1"
    """Address at which rank 0 meets the others."""
    master_port: int = 0
    """0 = a free port."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables for every process."""
    grace_seconds: float = 30.0
    """Time to save and leave after SIGTERM before a process is killed."""


@dataclass
class Config:
    name: str = "run"
    """Name of the run, used in logs."""
    run_dir: str = "runs/${name}"
    """Folder for logs, checkpoints, plots and the ledger of skipped samples."""
    seed: int = 1234
    """Seeds the weights, dropout and the sample order."""
    world_size: int = 0
    """Processes of the run; 0 = tp_size x pp_size (or what torchrun or srun say). The rest is data parallelism."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    platform: PlatformConfig = field(default_factory=PlatformConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
