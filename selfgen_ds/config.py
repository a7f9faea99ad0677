"""Every setting, as typed dataclasses that one YAML recipe and the overrides on the command line fill.

An override is `--section.field VALUE`. jsonargparse takes the types and the help texts from this file;
`selfgen_ds/validation/` holds the checks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import yaml


@dataclass(kw_only=True)
class LoraConfig:
    """Train low-rank adapters of a frozen model, through `peft`; the names are `peft`'s."""

    r: int = 8
    """Rank of the adapters."""
    lora_alpha: int = 8
    """The adapters' product is scaled by `lora_alpha / r`."""
    lora_dropout: float = 0.0
    """Dropout before the adapters, in training steps only."""
    target_modules: str | list[str] = "all-linear"
    """Linear layers to adapt: the ends of their names (`q_proj,v_proj`), a regular expression, or all of them except
    the LM head."""
    modules_to_save: list[str] = field(default_factory=list)
    """Ends of the names of modules that are trained whole beside the adapters, such as `embed_tokens`, `lm_head`."""
    export: Literal["merged", "adapter"] = "merged"
    """Form of the export: a whole model with the adapters added to its weights, or `peft`'s adapter folder."""


@dataclass(kw_only=True)
class ModelConfig:
    """The model: a Hugging Face folder or hub id, or a preset trained from scratch."""

    name_or_path: str | None = None
    """Hugging Face model folder or hub id. On the command line it replaces the recipe's `preset` and `tokenizer`."""
    preset: dict[str, Any] | None = None
    """Train from scratch: the fields of a `transformers` configuration, such as `{hidden_size: 64, ...}`, of the
    type that `model_type` names, or else of a Llama. Vocabulary and special tokens are the tokenizer's unless given.
    With `name_or_path`: the fields that the model's configuration must have."""
    tokenizer: str | None = None
    """Tokenizer folder or hub id; `byte` is built in (256 bytes, padding, and an end token). Default: the model's."""
    chat_template: str | None = None
    """File with a chat template (Jinja), which takes the place of the tokenizer's; exports have it too."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of weights and activations; with `bfloat16` the optimizer keeps float32 master weights."""
    attn_implementation: str = "sdpa"
    """Attention, as `transformers` names it: sdpa, eager, flex_attention, flash_attention_2 to 4, or OWNER/NAME of a
    kernel on the hub. Packed rows are fast with flash and flex attention alone."""
    resize_embeddings: bool = False
    """Add embeddings if the tokenizer has more ids than the model has embeddings; otherwise such a pair is refused."""
    trust_remote_code: bool = False
    """Allow code that a hub repository ships to run."""
    lora: LoraConfig | None = None
    """Freeze `name_or_path` and train adapters; checkpoints then hold only what is trained. Default: train the whole
    model."""


@dataclass(kw_only=True)
class Source:
    """One source of rows."""

    path: str
    """A JSONL, JSON, CSV, Parquet, or Arrow file, a folder of such files, a hub id, or a generated task:
    `builtin:pointer_chase`, `builtin:sort`, `builtin:running_sum`, `builtin:random_start`, also `builtin:sort/dev`."""
    subset: str | None = None
    """Subset (configuration) of a hub data set or of a folder that names its subsets."""
    split: str | None = None
    """Split of a hub data set or folder. Default: `train` for training, `test` for evaluation, or the only one."""
    weight: float | None = None
    """Share of the training rows relative to the other sources, whatever their sizes; the rows of a small source are
    then repeated. Without weights every row comes once per epoch."""
    prompt_column: str | None = None
    """Field with the prompt in this source. Default: `data.prompt_column`."""
    completion_column: str | None = None
    """Field with the completion in this source. Default: `data.completion_column`."""
    messages_column: str | None = None
    """Field with the conversation in this source. Default: `data.messages_column`."""
    streaming: bool = False
    """Hub data sets: tokenize rows while they are fetched, without keeping a copy of the raw files."""


Sources = str | Source | list[str | Source]


@dataclass(kw_only=True)
class DataConfig:
    """Training and evaluation rows."""

    train: Sources
    """A file, folder, hub id, or `builtin:<task>`; `{path: ..., subset: ..., split: ...}`; or a list of these."""
    eval: Sources | None = None
    """Evaluation rows, in the same forms (a built-in task gives its test set)."""
    prompt_column: str = "prompt"
    """Field with the text that the model is given."""
    completion_column: str = "completion"
    """Field with the text that the model learns to write."""
    messages_column: str = "messages"
    """Field with a conversation (`[{role: user, content: ...}, {role: assistant, content: ...}, ...]`), read if a
    row has no prompt and completion."""
    as_chat: bool | None = None
    """Put rows of two texts into the chat template, as a user's message and the answer to it. Default: the texts are
    learned as they are, and the log says so if the tokenizer has a chat template."""
    prompt_template: str = "{prompt}"
    """Text around the prompt in rows of two texts, such as `"Question: {prompt}\\nAnswer: "`."""
    date: str | None = None
    """Day, such as `2026-01-31`, that a chat template is told if it asks for the date. Default: the day on which the
    run was first started; `config.yaml` records it, and a resumed run takes it from there."""
    assistant_turns: Literal["all", "last"] = "all"
    """Assistant turns of a conversation that the model learns and that draws may replace: all, or the last one."""
    max_length: int = 2048
    """Longest row in tokens, prompt and response together; longer responses are truncated and counted."""
    max_truncated_share: float = 0.1
    """Refuse the data when more than this share of rows has a truncated response."""
    max_refused_share: float = 0.0
    """Refuse the data when more than this share of rows cannot be used: rows that are not as expected, that the chat
    template does not take, or whose prompt leaves no room for a response."""
    packing: bool = False
    """Put several samples into one training row of `max_length` tokens; no sample sees another one."""
    group_by_length: bool = False
    """Put rows of similar length into one step, which saves padding."""


@dataclass(kw_only=True)
class SelfgenConfig:
    """The method, which chooses the context that the model reads. Each method reads some of these settings."""

    method: str = "scheduled_sampling"
    """`sft`, `scheduled_sampling`, `bash`, `rac`, a control (`noise`, `own_samples`), or a class of your own,
    `module:Class`."""
    replace_probability: float = 0.25
    """Largest probability p with which a response token is replaced by one that the model drew."""
    schedule: Literal["constant", "linear", "exponential", "inverse_sigmoid"] = "constant"
    """Growth of p from 0 to `replace_probability`, over steps or rounds (`selfgen_ds.methods.schedule`)."""
    schedule_share: float = 0.5
    """Share of the training after which a growing schedule has reached `replace_probability`, or 99 % of it."""
    final_share: float = 0.0
    """Last share of the training, in which p is `final_probability`."""
    final_probability: float = 0.0
    """p in the last share of the training; 0 ends it as sft."""
    clean_share: float = 0.0
    """Share of the rows whose context stays the reference, drawn anew in every step or round."""
    position: Literal["even", "early", "late", "span"] = "even"
    """Variation of p within an answer: none, or linearly between p and 0, with the largest value at the answer's
    start (`early`) or end (`late`). With `span`, p is the probability that a row has one run of drawn tokens."""
    span_tokens: int | None = None
    """Tokens of the run with `position: span`. It starts anywhere in the row's answers, and ends with its answer."""
    passes: int | Literal["exact"] | None = None
    """Parallel passes of a draw: 1 is two-pass scheduled sampling, k is parallel scheduled sampling, `exact` repeats
    the pass until no token changes, which gives the sequential process. Default: 1 online, `exact` in rounds and for
    spans."""
    temperature: float = 1.0
    """Softmax temperature of the draws."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with at least this probability mass."""
    top_k: int = 0
    """Draw from the k most probable tokens; 0 means all."""
    max_differing_share: float = 1.0
    """Largest share of a response's tokens that may differ from the reference in its context; after the last
    allowed token the context is the reference again."""
    max_differing_tokens: int | None = None
    """Most tokens of a row that may differ from the reference in its context, in the same way."""
    runaway: Literal["warn", "stop", "lower"] = "warn"
    """What to do when more and more drawn tokens differ from the reference while the loss rises, or when more tokens of
    a round differ than of the round before: say so, stop after a save, or halve p."""
    drawn_context_weight: float = 1.0
    """Weight in the loss of a target that directly follows a drawn token."""
    epochs_per_round: int = 1
    """Rounds: epochs of training on the rows that the model drew at the round's start."""
    reject: list[str] | str | None = None
    """Rounds: text that a drawn answer must not reinforce, as a list of regular expressions, `["[0-9]+%"]`, or as
    `module:function`, a function from text to spans `(start, end)` of characters; there the reference is put back."""
    noise: Literal["unigram", "uniform"] = "unigram"
    """Distribution of the tokens of the control `noise`: as often as in the responses of the data, or all alike."""
    rollouts: str | None = None
    """Rounds: the `rollouts/` of another run. The rounds that the folder has when this run first starts are read
    instead of drawn."""
    generation_batch_size: int = 64
    """Rows that a rank generates at once; fewer if memory is short."""
    generate_command: str | None = None
    """Rounds of whole answers: command that answers a round's prompts in the model's place, such as an inference engine
    (docs/engines.md). It is run once per host, without a shell, with paths in the places of `{model}`, `{prompts}`, and
    `{answers}`. Default: the run's own model answers."""
    max_new_tokens: int | None = None
    """Tokens of the longest answer that the model may write. Default: tokens of the longest response in the data."""
    answers_per_prompt: int = 1
    """Answers drawn for each prompt; each answer makes a row."""
    sft_share: float = 0.5
    """Share of samples that are trained on without a model answer in the context, so that the model still answers
    directly."""
    cue: str | None = None
    """Text that asks for the correction: in conversations the content of a user's turn, otherwise plain text.
    Default: `Correct your answer.` as a turn, `\\nCorrected answer: ` as text."""
    max_equal_share: float = 1.0
    """Largest share of rows whose model answer equals the reference: 1 keeps all of these rows, 0 drops them."""


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW and its schedule. Norms and biases get no weight decay."""

    learning_rate: float = 2e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moment decays."""
    epsilon: float = 1e-8
    """Adam's epsilon."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, or decayed to 0 at the last step."""
    warmup_ratio: float = 0.1
    """Share of the training steps over which the learning rate grows linearly from 0."""
    max_grad_norm: float = 1.0
    """Gradient norm to clip to; 0 turns clipping off."""
    loss: Literal["cross_entropy", "dft"] = "cross_entropy"
    """Loss of a target: its cross entropy, or that times the probability of the target, which counts as a constant
    (`dft`, arXiv 2508.05629): targets that the model finds improbable weigh little."""
    dft_share: float = 1.0
    """Last share of the run's steps that have the loss `dft`; the loss before it is the cross entropy, by which targets
    are learned that the model still finds improbable. A raised `train.max_steps` moves the first of them."""
    label_smoothing: float = 0.0
    """Share of the target's probability mass that is spread evenly over the vocabulary."""


@dataclass(kw_only=True)
class TrainConfig:
    """Length and shape of the run."""

    epochs: float | None = None
    """Passes over the training rows. Give either this or `max_steps`."""
    max_steps: int | None = None
    """Optimizer steps. A resumed run may raise the number."""
    rows_per_step: int | None = None
    """Rows of an optimizer step, whatever the number of ranks: accumulation follows from it. Give either this or
    `micro_batch_size`; with both, the latter is the largest that fits into memory."""
    micro_batch_size: int | None = None
    """Rows per rank in one forward. With `rows_per_step`, the most rows: by default all that a rank has in a step."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per rank whose gradients are summed before an optimizer step; 1 with `rows_per_step`."""
    activation_checkpointing: bool = True
    """Recompute each layer's activations in the backward pass instead of keeping them."""
    max_nonfinite_steps: int = 5
    """Stop after this many steps in a row whose loss or gradient was not finite. Each such step is skipped."""
    stall_seconds: float = 600.0
    """Seconds without a forward on any rank, after which every rank prints its stacks; twice as long ends the run."""
    start_stall_seconds: float = 6000.0
    """The same before the first step, where a rank may read, tokenize or convert while the others wait."""

    def shape(self, ranks: int) -> StepShape:
        """Return what a step of so many ranks consists of."""
        if self.rows_per_step is None:
            size, accumulation = self.micro_batch_size or 1, self.gradient_accumulation_steps
            return StepShape(rows=size * accumulation * ranks, micro_batch_size=size, accumulation=accumulation)
        of_rank = -(-self.rows_per_step // ranks)
        accumulation = -(-of_rank // (self.micro_batch_size or of_rank))
        size = -(-of_rank // accumulation)
        return StepShape(rows=self.rows_per_step, micro_batch_size=size, accumulation=accumulation)


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What an optimizer step consists of."""

    rows: int
    """Rows of all ranks; the last micro-batches of some ranks may be short."""
    micro_batch_size: int
    """Rows per rank in one forward."""
    accumulation: int
    """Forwards per rank."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the run is saved, and which checkpoints are kept. The last step is always saved."""

    every: int = 500
    """Optimizer steps between checkpoints."""
    keep: int = 2
    """Newest complete checkpoints to keep, in addition to the best one (`eval.best`)."""
    stall_seconds: float = 1500.0
    """As `train.stall_seconds`, while a checkpoint is written or the model is exported."""


@dataclass(kw_only=True)
class EvalConfig:
    """Evaluation during training, on `data.eval`."""

    every: int | None = None
    """Optimizer steps between evaluations. Default: only after the last step."""
    max_samples: int = 256
    """Rows to evaluate: the first rows of `data.eval`, as many from each source."""
    batch_size: int = 64
    """Rows that a rank evaluates at once."""
    sample_temperatures: list[float] = field(default_factory=list)
    """Temperatures above 0 at which further answers are sampled and scored (`eval_sampled_1.5_*`), such as `[1]`."""
    best: str = "loss"
    """Metric whose best checkpoint is kept: `loss` (the lowest), or another evaluation metric (the highest)."""
    patience: int | None = None
    """Evaluations in a row without a better `best` after which the run ends and exports its best checkpoint. Without
    them, a run exports its last step."""
    shown_answers: int = 2
    """Evaluation rows whose answers are logged, and written to TensorBoard as text."""


@dataclass(kw_only=True)
class Recipe:
    """All settings of a run."""

    output_dir: str
    """Folder that the run writes to."""
    deepspeed: str
    """DeepSpeed JSON, by path or by the name of a packaged one; `"auto"` values are filled from this recipe."""
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    selfgen: SelfgenConfig = field(default_factory=SelfgenConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run_name: str | None = None
    """Name of the run in Weights & Biases. Default: the name of `output_dir`."""
    wandb_project: str | None = None
    """Project in Weights & Biases that the metrics also go to. The package `wandb` has to be installed."""
    seed: int = 0
    """Seed of weights, data order, replacement masks, and draws."""
    resume: Literal["auto"] | None = None
    """`auto`: continue from the newest complete checkpoint in `output_dir`, or start if there is none."""
    trust_checkpoint: bool = False
    """Let the files of a checkpoint run code when they are loaded. By default anything but plain data is refused."""


@dataclass(kw_only=True)
class InspectedRecipe(Recipe):
    """The recipe of `inspect`, of which only a model and data have to be given."""

    output_dir: str = "inspected"
    """Folder that the run would write to; nothing is written."""
    deepspeed: str = "zero3_cpu"
    """DeepSpeed JSON of the run; it does not change the rows."""


@dataclass(kw_only=True)
class InspectOptions:
    """Show what a recipe's rows become, without training."""

    rows: int = 3
    """Training rows to show."""
    draw: bool = False
    """Load the model, and show the tokens that it draws."""


@dataclass(kw_only=True)
class BenchOptions:
    """Measure what training on the model's own tokens costs, as ratios to sft. The recipe (the packaged `bench` unless
    `--config` names another one) gives the model, the JSON, the rows per micro-batch, `data.max_length` and the
    settings of the draws. The rows are random tokens."""

    grid: Literal["budget", "rollouts", "full"] = "budget"
    """Cost to measure: that of a pass, of rounds, or both with more variants."""
    steps: int = 7
    """Timed steps of every variant; rounds have three timed turns."""


@dataclass(kw_only=True)
class ProbeOptions:
    """Take a few steps of a recipe, save nothing, and print as JSON what they cost: floating-point operations, time and
    memory."""

    steps: int = 4
    """Optimizer steps; with 0, everything is loaded and checked, and no step is taken."""


@dataclass(kw_only=True)
class PilotOptions:
    """Try methods on a part of your data before you pay for all of it: sft and every method are trained on a few seeds,
    at the budget of sft in floating-point operations, and evaluated on held-out rows. The report has a verdict per
    metric. A pilot that was stopped goes on when it is started again."""

    rows: int
    """Training rows, drawn at random from `data.train`."""
    held_out: int = 200
    """Rows to evaluate on, drawn from `data.eval` if the recipe has it, and otherwise from the other training rows."""
    methods: list[str | dict[str, Any]] = field(default_factory=list)
    """Methods to compare with sft: names, `[bash, rac]`, or settings of `selfgen` and, with their section, of `optim`:
    `[{method: bash, temperature: 2, optim.loss: dft}]`. Default: that of the recipe, or `scheduled_sampling` if it is
    sft."""
    seeds: int = 3
    """Runs of every method, with seeds from the recipe's on."""
    metrics: list[str] = field(default_factory=list)
    """Metrics of the verdicts. The fewer there are, the smaller a difference can be shown. Default: the quality of
    greedy and sampled answers, the tokens after a forced error, and the loss."""
    evaluation: dict[str, Any] = field(default_factory=lambda: {"sample_temperatures": [1.0]})
    """Options of `selfgen-ds evaluate`, such as `{sample_temperatures: [1], weight_bits: [4]}`."""
    group_by: str | None = None
    """Field of the rows whose values divide the held-out rows into kinds, for a verdict on each kind."""
    ranks: int = 1
    """Processes of a run, all on one host: one per accelerator."""
    jobs: int = 1
    """Runs at the same time on this host."""
    keep_models: bool = False
    """Keep checkpoints, rounds and models of the runs after their evaluation."""


@dataclass(kw_only=True)
class EvaluateOptions:
    """Evaluate a Hugging Face model folder. Under a launcher, the ranks share the rows; each holds the model."""

    model: str
    """Hugging Face folder or hub id, such as a run's `model/`."""
    data: Sources
    """Rows, in the forms of `data.eval` of a recipe (a built-in task gives its test set)."""
    output_dir: str
    """Folder for `evaluation.json`; give the run's folder if `compare` shall read the result."""
    prompt_column: str = "prompt"
    """Field with the text that the model is given."""
    completion_column: str = "completion"
    """Field with the reference."""
    messages_column: str = "messages"
    """Field with a conversation, whose last turn is the reference; read if a row has no prompt and completion."""
    as_chat: bool | None = None
    """Put rows of two texts into the chat template, as `data.as_chat` of a recipe."""
    prompt_template: str = "{prompt}"
    """Text around the prompt in rows of two texts, as `data.prompt_template` of a recipe."""
    chat_template: str | None = None
    """File with a chat template that takes the place of the tokenizer's, as `model.chat_template` of a recipe."""
    max_refused_share: float = 0.0
    """Refuse the data when more than this share of rows cannot be used for another reason than their length."""
    date: str | None = None
    """Day that a chat template is told if it asks for the date, as `data.date` of a recipe. Default: today."""
    max_samples: int | None = None
    """Rows to evaluate: the first rows, as many from each source. Default: all rows."""
    max_length: int | None = None
    """Longest row in tokens; longer responses are cut, and rows whose prompt leaves no room are left out. Both are
    counted. Default: the model's positions."""
    max_new_tokens: int | None = None
    """Tokens of the longest answer. Default: those of the longest reference."""
    batch_size: int = 64
    """Rows that a rank evaluates at once."""
    sample_temperatures: list[float] = field(default_factory=list)
    """Temperatures above 0 at which further answers are sampled and scored (`sampled_1.5_*`), such as `[1, 1.5]`."""
    answers_per_prompt: int = 1
    """Answers that are sampled for each prompt and temperature; with more than one, pass@k is computed."""
    prefix_shares: list[float] = field(default_factory=list)
    """Shares of the reference, between 0 and 1, that the model is given and continues (`prefix_0.5_*`)."""
    forced_error_shares: list[float] = field(default_factory=lambda: [0.5])
    """Places of the reference, as shares of its length, where the model's own second choice takes the place of the
    right token (`recovery_*`); `[]` for none. Built-in tasks have an error of their own."""
    weight_noise: list[float] = field(default_factory=list)
    """Normal noise to add to the weights, as shares of each tensor's standard deviation (`noise_0.01_*`)."""
    weight_bits: list[Literal[8, 4]] = field(default_factory=list)
    """Bits of integers to round the weights to (`int8_*`, `int4_*`)."""
    embedding_model: str | None = None
    """Model of `sentence-transformers`, by folder or hub id, for `embedding_distance`. The package has to be
    installed."""
    oracle: str | None = None
    """Folder or hub id of a better model with the same tokenizer, for `excess_error`."""
    judge_url: str | None = None
    """OpenAI-compatible endpoint of a judge, such as `http://localhost:8000/v1`, which compares the greedy answers with
    others (`win_rate`). A key is read from the environment variable `OPENAI_API_KEY`."""
    judge_model: str | None = None
    """Name of the judge at the endpoint."""
    judge_against: str = "reference"
    """Answers to compare with: the references, or the folder of another evaluation of the same rows."""
    metric: str | None = None
    """Metric of your own: `module:function`, a function of the texts (prompt, answer, reference) that returns a
    number."""
    correction_rounds: int = 0
    """Number of times that the model is asked to correct its greedy answer (`corrected_*`)."""
    cue: str | None = None
    """Text that asks for a correction, as `selfgen.cue` of a recipe: give the cue that the model was trained with."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations. Default: the one that the model's folder names."""
    attn_implementation: str = "sdpa"
    """Attention, as in a recipe's `model.attn_implementation`."""
    trust_remote_code: bool = False
    """Allow the code that a model brings in its own folder to run."""
    seed: int = 0
    """Seed of the sampled answers, which do not depend on the number of ranks."""


@dataclass(kw_only=True)
class GenerateOptions:
    """Answer a prompt, a file of prompts, or, without either, what is typed at the terminal."""

    model: str
    """Model folder, adapter folder, hub id, or a checkpoint of a run."""
    prompt: str | None = None
    """The prompt to answer."""
    prompts: str | None = None
    """File of prompts: one in each line (`.txt`), or rows with a text or messages in `prompt_column`, or `messages`."""
    prompt_column: str = "prompt"
    """Field with the prompt in a file of rows."""
    prompt_template: str = "{prompt}"
    """Text around a prompt that is a text, as `data.prompt_template` of the recipe that the model was trained with."""
    output: str | None = None
    """New file for the prompts and answers, as JSONL. Default: the terminal."""
    as_chat: bool | None = None
    """Put a prompt into the chat template. Default: if the model has one."""
    chat_template: str | None = None
    """File with a chat template that takes the place of the tokenizer's."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as `{"enable_thinking": false}`; those of a row come first."""
    max_new_tokens: int | None = None
    """Tokens of the longest answer. Default: 256, or as many as the model has positions for after the prompt."""
    temperature: float = 0.0
    """Temperature at which answers are sampled; at 0 they are greedy."""
    trust_remote_code: bool = False
    """Allow the code that a model brings in its own folder to run."""
    seed: int = 0
    """Seed of sampled answers."""


@dataclass(kw_only=True)
class CompareOptions:
    """Compare evaluated runs; the first is the baseline."""

    runs: list[str]
    """Folders with the `config.yaml` that `train` writes, and the `evaluation.json` and `predictions.jsonl` that
    `evaluate` writes."""
    output_dir: str
    """Folder for `comparison.html`, `comparison.md`, `comparison.json` and `comparison.png`."""
    metrics: list[str] = field(default_factory=list)
    """Metrics to compare, such as `[rouge_l, recovery_4]`. The fewer there are, the smaller a difference can be shown.
    Default: all that the evaluations have."""


@dataclass(kw_only=True)
class ExportOptions:
    """Write the model of a checkpoint as a Hugging Face folder, in one process."""

    checkpoint: str
    """A complete checkpoint, such as `runs/x/checkpoints/step-000100`."""
    output_dir: str
    """Folder to write; it must not exist."""
    trust_checkpoint: bool = False
    """Let the checkpoint's files run code when they are loaded. By default anything but plain data is refused."""
    trust_remote_code: bool = False
    """Allow the code that a model brings in its own folder to run."""
    lora_export: Literal["merged", "adapter"] | None = None
    """Form in which adapters are written. Default: `model.lora.export` of the run."""


def sources(value: Sources | None) -> list[Source]:
    """Return a setting for rows as a list of sources."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [Source(path=v) if isinstance(v, str) else v for v in values]


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, in the order of the dataclasses."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False)


def by_name(recipe: Recipe) -> dict[str, Any]:
    """Return every setting by its name, such as `train.max_steps`, with the value that `config.yaml` has."""
    return flat(yaml.safe_load(to_yaml(recipe)))


def default_settings() -> dict[str, Any]:
    """Return the default of every setting of a recipe by its dotted name; those without one are empty."""
    return flat(asdict(Recipe(output_dir="", deepspeed="", data=DataConfig(train=""))))


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names."""
    settings: dict[str, Any] = {}
    for key, value in node.items():
        settings |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return settings
