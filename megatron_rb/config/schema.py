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
    vision_per_slice: list[int] = field(default_factory=list)
    """The same for every slice of the layout, in the order of the pipeline; empty = `vision` in all of them."""
    language_per_slice: list[int] = field(default_factory=list)
    """The same for every slice of the layout, in the order of the pipeline; empty = `language` in all of them."""


@dataclass
class AdapterConfig:
    """Low-rank factors (LoRA) beside frozen linears."""

    patterns: list[str] = field(default_factory=lambda: ["all-linear"])
    """Linears by transformers' names: last words (`q_proj`), patterns (`model.visual.*.mlp.*`), or `all-linear`."""
    rank: int = 16
    """Columns between the two factors of a linear."""
    alpha: float = 32.0
    """The product of the factors counts `alpha / rank` times."""
    dropout: float = 0.0
    """Share of the inputs of the factors that is dropped in training."""
    rslora: bool = False
    """Count the product `alpha / sqrt(rank)` times."""
    init: str = ""
    """Folder of peft to continue from, which says modules, rank, alpha and rslora too; empty = fresh factors."""


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
    adapters: dict[str, AdapterConfig] = field(default_factory=dict)
    """Adapters by name, e.g. `{lora: {patterns: [q_proj], rank: 16}}`; with any, all other weights are frozen."""
    train_in_full: list[str] = field(default_factory=list)
    """Modules that are trained in full beside adapters, by transformers' names, e.g. `[embed_tokens, lm_head]`."""
    published: str = ""
    """Published model whose sizes these are, e.g. `RoboBrain2.0-7B`; read for plans, dry runs and rehearsals while the
    folder of `hf_path` is not there yet, as that of a stage that has not been trained."""


@dataclass
class ParallelConfig:
    tp_size: int = 1
    """Tensor-parallel degree of ViT and LLM."""
    pp_size: int = 1
    """Pipeline-parallel degree."""
    cp_size: int = 1
    """Context-parallel degree: ranks that share the tokens, and the images and video frames, of every micro-batch."""
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
    """Shard the optimizer state over the data- and context-parallel ranks."""
    auto: bool = False
    """Let `rb launch` plan tp_size, pp_size, layout, micro-batches and recompute before the start (`parallel=auto`)."""
    timeout_minutes: float = 10.0
    """A collective that takes longer fails, and with it the run."""


@dataclass
class PlannerConfig:
    device: str = ""
    """Devices of the run: a name in conf/device or a yaml file; empty = `cpu` on platform cpu, else unknown."""
    histogram: str = ""
    """Sizes of the samples, as `rb data stats` writes them; empty = the rows of data.train are looked at."""
    calibration: str = ""
    """Block times that `rb bench blocks` has measured on the device; empty = figures of the device alone."""
    max_memory: float = 0.0
    """Bytes of a device that may be used; 0 = all it has."""
    check_memory: bool = True
    """`rb launch` refuses a run whose forecast is over the memory of `planner.device`, or of the recipe's devices."""


@dataclass
class PlatformConfig:
    name: str = "auto"
    """`cpu`, `cuda`, `musa` or a registered plug-in; `auto` = the one accelerator present, else cpu."""
    threads_per_rank: int = 0
    """Intra-op CPU threads of a rank; 0 = OMP_NUM_THREADS where it is set, else cores of the machine / ranks on it.
    `rb launch` does not look at OMP_NUM_THREADS: the machines it starts processes on may have other cores."""
    tf32: bool = False
    """Let fp32 matrix products round their inputs to TF32. Vendors' own defaults differ; this one holds everywhere."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables that the vendor's runtime needs in every process; `cluster.env` wins over them."""


@dataclass
class KernelsConfig:
    mrope: str = "auto"
    """Rotary embedding, with QK-norm and without: `triton`, `torch`, or `auto` (the best that can run here)."""
    window_attention: str = "auto"
    """Windowed attention of the ViT: `triton`, `torch` or `auto`."""
    varlen_attention: str = "auto"
    """Attention over packed sequences of the local layers: `flash_attn_3`, `flash_attn` (release 2), `flash_attn_4`,
    `torch_varlen`, `torch` (SDPA) or `auto`. Transformer Engine's comes with its layers (`model.layers`)."""
    dynamic_padding: str = "auto"
    """Row gather and scatter between ViT and language model: `triton`, `torch` or `auto`."""
    linear_cross_entropy: str = "auto"
    """Loss without logits in memory: `liger` (Liger-Kernel's cross entropy on each chunk), `torch` or `auto`."""
    rms_norm: str = "auto"
    """Norms of the local layers: `liger`, `torch` or `auto`."""
    swiglu: str = "auto"
    """Gated activation of the MLPs: `liger`, `torch` or `auto`."""


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
    loss_turns: str = "all"
    """Turns of the assistant that are learned: `all`, or the `last` of each conversation. A turn that says `"loss"`,
    `"weight"` or the like itself goes by that."""
    box_text: str = "tokens"
    """How boxes of ms-swift's `"objects"` are written: `tokens` (`<|box_start|>(x1,y1),(x2,y2)<|box_end|>`, as ms-swift
    does by default) or `list` (`[x1, y1, x2, y2]`, as in Qwen's cookbooks)."""
    allow_changed: bool = False
    """Continue from a checkpoint although the data files are not what they were: the order of samples is another, so
    some of the epoch come twice and others not at all."""
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
    global_micro_batches: int = 0
    """Micro-batches per optimizer step, over all data-parallel ranks, each filled with as many samples as fit: steps of
    equal work and a varying number of samples. 0 = a step is `global_batch_size` samples."""
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
    read_seconds: float = 60.0
    """Time that an image or video file has to answer. One that has not after two tries is unreadable, and named in the
    ledger; 0 = wait for ever."""
    prefetch_steps: int = 2
    """Steps that are prepared ahead of the one that runs."""
    decode_threads: int = 2
    """Threads that decode images on a rank that needs pixels."""


@dataclass
class OptimizerConfig:
    name: str = "adamw"
    """`adamw`, or `sgd` with momentum and weight decay that is added to the gradient."""
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
    """Decay of the running mean of the gradient (adamw)."""
    beta2: float = 0.999
    """Decay of the running mean of the squared gradient (adamw)."""
    eps: float = 1e-8
    """Added to the denominator of the update (adamw)."""
    momentum: float = 0.9
    """Decay of the running sum of the gradient (sgd)."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    max_bad_steps: int = 3
    """A step whose loss or gradient norm is not finite, or that has nothing to learn, does not change the weights; so
    many of them in a row end the run. Such a run is not tried again by itself."""


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
class CaptureConfig:
    every: int = 0
    """Steps from one captured step to the next, beginning with step 1; 0 = none. For `rb compare numerics`."""
    dir: str = ""
    """Folder of the captures; empty = `<run_dir>/captures`."""
    limit: int = 10
    """Most steps that one process captures; later ones are not."""
    samples: int = 2
    """Samples of a step that are kept: the one with the fewest vision patches, then the shortest ones."""
    rows: int = 32
    """Tokens, and vision patches, of such a sample whose values are kept."""
    context: int = 512
    """Beginning of a sample that these rows are spread over; keys and values are kept for all of it."""
    features: int = 64
    """Output features of each linear whose weights are kept, to compute it again in fp64."""


@dataclass
class ProfileConfig:
    steps: list[int] = field(default_factory=list)
    """Optimizer steps of which torch.profiler writes a trace, e.g. `[10, 11]`; empty = none."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that write one."""
    memory: bool = False
    """Keep who allocated device memory; these ranks write a snapshot after the last of the steps, and every rank at an
    out-of-memory error."""
    dir: str = ""
    """Folder of traces and snapshots; empty = `<run_dir>/profile`."""


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
    compare_ranks_every: int = 50
    """Steps between two comparisons of the ranks' times, which name a rank that holds the others up; 0 = never."""
    peak_tflops: float = 0.0
    """Peak of a device in TFLOP/s, what MFU is a share of; 0 = that of its data sheet (conf/device), and no MFU where
    that is not known."""
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)


@dataclass
class TaskConfig:
    name: str = "sft"
    """What is trained: `sft`, or `value` (the same loss; the hop samples are judged on their own as well)."""


@dataclass
class SlurmConfig:
    partition: str = ""
    """Partition to submit to; empty = the cluster's default."""
    account: str = ""
    """Account that is charged; empty = the user's default."""
    qos: str = ""
    """Quality of service; empty = the default."""
    reservation: str = ""
    """Reservation to run in; empty = none."""
    time: str = ""
    """Time limit as Slurm writes it, e.g. `2-00:00:00`; empty = the partition's."""
    constraint: str = ""
    """Node features that are required; empty = any node."""
    exclude: str = ""
    """Nodes never to use, e.g. `node[3,7]`."""
    gpus_per_node: int = -1
    """Devices asked for on a node; -1 = one per process, or none with platform `cpu`."""
    cpus_per_task: int = 0
    """Cores of a process; 0 = the cluster's default."""
    options: list[str] = field(default_factory=list)
    """Further `#SBATCH` options, e.g. `[--exclusive, --mem=0]`."""
    srun_options: list[str] = field(default_factory=list)
    """Further options of the `srun` that starts the processes."""
    setup: list[str] = field(default_factory=list)
    """Shell lines of the batch script before anything starts, e.g. `[module load cuda/12.8]`."""
    template: str = ""
    """A Jinja2 file in place of `launch/sbatch.j2`; it gets the same names."""
    container_image: str = ""
    """Image that the processes run in; empty = no container."""
    container_runtime: str = "pyxis"
    """What opens the image: `pyxis` (srun options of enroot's plug-in) or `apptainer`."""
    container_mounts: list[str] = field(default_factory=list)
    """Mounts as the runtime writes them, e.g. `[/data:/data]`; run folder and working folder are always mounted."""
    warning_seconds: int = 120
    """Time before the limit of the job at which the run saves and is queued again."""
    array_limit: int = 0
    """Most runs of a sweep that may run at the same time; 0 = as many as fit."""


@dataclass
class SshConfig:
    hostfile: str = ""
    """File with a line `host slots=8 type=A800` per machine; `type` is free text and may be left out."""
    hosts: list[str] = field(default_factory=list)
    """Machines, instead of a host file."""
    options: list[str] = field(default_factory=list)
    """Options of `ssh`, e.g. `[-F, my_ssh_config]`."""
    fan_out: int = 64
    """Most connections that are opened at the same time."""
    connect_seconds: float = 10.0
    """Time a machine has to answer."""


@dataclass
class ClusterConfig:
    name: str = "local"
    """Where the processes start: `local`, `ssh` or `slurm`."""
    nodes: int = 1
    """Machines of the run."""
    processes_per_node: int = 0
    """0 = what the parallel sizes need (`world_size`), spread evenly."""
    spare_nodes: int = 0
    """Machines held in addition, which take the place of one that is lost."""
    max_retries: int = 0
    """Failed attempts in a row without a new checkpoint that are repeated; 0 = the first failure ends the run."""
    launcher: str = "auto"
    """What starts the processes of a machine: `direct`, `srun`, `torchrun`, `ft_launcher` (of nvidia-resiliency-ext),
    or `auto`: direct on this machine, torchrun over ssh, srun under Slurm."""
    python: str = ""
    """Python of the training processes; empty = the one that runs `rb`."""
    host_python: str = ""
    """Python of the restart loop where `python` exists in a container only; empty = `python`."""
    master_addr: str = ""
    """Address at which rank 0 meets the others; empty = the machine of rank 0."""
    master_port: int = 0
    """0 = a free port."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables for every process."""
    type_env: dict[str, dict[str, str]] = field(default_factory=dict)
    """Environment variables by the `type` of the host file; win over `env`."""
    node_env: dict[str, dict[str, str]] = field(default_factory=dict)
    """Environment variables by host name; win over `type_env`."""
    secrets: list[str] = field(default_factory=list)
    """Names of variables that are handed on from the environment of `rb launch` and never written down."""
    after: str = ""
    """Run folder (or Slurm job id) of a run that must have finished well before this one starts (Slurm only)."""
    grace_seconds: float = 30.0
    """Time to save and leave after SIGTERM before a process is killed."""
    silence_seconds: float = 4.0
    """A machine whose supervisor says nothing for so long is lost."""
    hang_seconds: float = 1800.0
    """Time without progress that counts as a hang in a phase whose usual time is not known yet."""
    least_hang_seconds: float = 60.0
    """No limit that is learnt from the run (twice its slowest step and a little) is shorter: a busy machine, a plot or
    a rare large batch is no hang."""
    return_seconds: float = 30.0
    """Time a lost machine has to answer again where no spare is left; after it the job is queued again without it."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    ssh: SshConfig = field(default_factory=SshConfig)


@dataclass
class RecipeConfig:
    devices: list[str] = field(default_factory=list)
    """Devices (conf/device) that the recipe is made for: with their memory it has been rehearsed. Empty = any."""
    world_size: int = 0
    """Processes that its authors trained on; 0 = not published."""


@dataclass
class Config:
    name: str = "run"
    """Name of the run, used in logs."""
    run_dir: str = "runs/${name}"
    """Folder for logs, checkpoints, plots and the ledger of skipped samples."""
    seed: int = 1234
    """Seeds the weights, dropout and the sample order."""
    world_size: int = 0
    """Processes of the run; 0 = tp_size x pp_size x cp_size (or what torchrun or srun say). The rest is data
    parallelism."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    platform: PlatformConfig = field(default_factory=PlatformConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
