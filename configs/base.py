"""The pre-training recipe in every size: --config=configs/base.py[:tiny|small|base|large|huge].

Each number names its source: "paper" (Duan et al., CVPR 2022), "ALBEF" (Li et al., NeurIPS 2021), "SwAV",
"BERT", "ViT", or "ours" with the reason. Values that differ between sizes are in `SIZES`, `TINY` and `LARGER`; what `tiny`
does otherwise than the paper, to learn more in minutes, in `IN_MINUTES`. configs/paper.py leaves those out.
"""

import types
from typing import Any

import ml_collections

from codebook_jax.errors import did_you_mean

# What the sizes of the paper and above share.
PAPER = dict(
    dtype="bfloat16",
    learning_rate=1e-4,
    learning_rate_ends=1e-5,
    warmup_steps=2000,
    dropout=0.1,
    momentum=0.995,
    momentum_ramp=False,
)
# Encoders: ViT-B/L/H and BERT-base/large above `small`; the two smallest sizes are ours.
SIZES = {
    "tiny": dict(
        image=dict(size_px=64, patch_px=8, width=128, depth=4, heads=4),
        text=dict(width=128, depth=2, fusion_depth=2, heads=4, max_tokens=24, max_positions=64),
        dim=64,
        codes=512,
        queue=64,
        batch=64,
        steps=540,
        examples=20_000,
        dtype="float32",
        learning_rate=1.5e-3,
        learning_rate_ends=1.5e-5,
        warmup_steps=40,
        dropout=0.0,
        momentum=0.99,
        momentum_ramp=True,
    ),
    "small": dict(
        image=dict(size_px=224, patch_px=16, width=384, depth=12, heads=6),
        text=dict(width=384, depth=4, fusion_depth=4, heads=6, max_tokens=30, max_positions=512),
        dim=256,
        codes=2000,
        queue=16_384,
        batch=256,
        steps=40_000,
        examples=1_000_000,
        dtype="bfloat16",
        learning_rate=5e-4,
        learning_rate_ends=1e-5,
        warmup_steps=2000,
        dropout=0.1,
        momentum=0.995,
        momentum_ramp=True,
    ),
    "base": dict(
        image=dict(size_px=256, patch_px=16, width=768, depth=12, heads=12),
        text=dict(width=768, depth=6, fusion_depth=6, heads=12, max_tokens=30, max_positions=512),
        dim=256,
        codes=4000,
        queue=65_536,
        batch=512,
        steps=58_590,
        examples=1_000_000,
        **PAPER,
    ),
    "large": dict(
        image=dict(size_px=256, patch_px=16, width=1024, depth=24, heads=16),
        text=dict(
            width=1024, depth=12, fusion_depth=12, heads=16, max_tokens=30, max_positions=512
        ),
        dim=256,
        codes=8000,
        queue=65_536,
        batch=1024,
        steps=29_295,
        examples=1_000_000,
        **PAPER,
    ),
    "huge": dict(
        image=dict(size_px=224, patch_px=14, width=1280, depth=32, heads=16),
        text=dict(
            width=1024, depth=12, fusion_depth=12, heads=16, max_tokens=30, max_positions=512
        ),
        dim=512,
        codes=16_000,
        queue=65_536,
        batch=2048,
        steps=14_648,
        examples=1_000_000,
        **PAPER,
    ),
}


# The other values that differ: those of `tiny`, and those of the sizes above it.
TINY = dict(
    log_every_steps=10,
    scan_unroll=4,
    image_init_std=0.12,
    position_std=0.6,
    text_init_std=0.06,
    value_std=0.06,
    embedding_std=0.1,
    threads=2,
    prefetch=4,
    evaluate_every_steps=200,
    evaluation_batch=64,
    rerank_top_k=16,
    save_every_steps=200,
)
LARGER = dict(
    log_every_steps=50,
    scan_unroll=1,
    image_init_std=0.02,
    position_std=0.02,
    text_init_std=0.02,
    value_std=0.02,
    embedding_std=0.02,
    threads=16,
    prefetch=16,
    evaluate_every_steps=5000,
    evaluation_batch=256,
    rerank_top_k=128,
    save_every_steps=2000,
)

# docs/learning.md has what each brings.
IN_MINUTES = {
    "train.steps": 700,
    "optimizer.name": "muon",
    "model.image.stem": "conv",
    "model.image.patch_px": 16,
    "model.pool": "mean",
    "model.text.position_std": 0.02,  # a mean of tokens would be full of larger positions
    "teacher.alpha": 0.0,
    "queue.size": 512,
    "data.alike": 16,
    "data.crop_scale": (1.0, 1.0),  # a scene's test pictures are whole
    "evaluation.rerank_score": "log_odds",
    "evaluation.rerank_dual_weight": 0.5,
}


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """The locked config of one size; raises ValueError for a size that does not exist."""
    config = paper(size)
    if size == "tiny":
        config.update_from_flattened_dict(IN_MINUTES)
    return config


def paper(size: str) -> ml_collections.ConfigDict:
    """The locked config of one size with the paper's choices."""
    if size not in SIZES:
        sizes = f"the sizes are {', '.join(SIZES)}{did_you_mean(size, SIZES)}"
        raise ValueError(f"configs/base.py has no size {size!r}; {sizes}")
    at = types.SimpleNamespace(**SIZES[size], **(TINY if size == "tiny" else LARGER))
    config = ml_collections.ConfigDict()
    config.size = size
    config.task = "pretrain"
    config.seed = 0
    config.log_every_steps = at.log_every_steps

    # Where the weights start: "random" | "image:SPEC,text:SPEC" (a ViT or DeiT, a BERT; or random) | "model:SPEC" (a whole
    # ALBEF model, a run or an export). SPEC: a file, a folder, or a name on the Hugging Face hub.
    config.init = "random"
    # true: initialise a parameter that SPEC holds only in part, instead of stopping
    config.init_allow_partial = False

    # Devices along each axis; -1: all that are left. The batch is split over data x fsdp; parameters, teacher and moments over
    # fsdp (0: as few as fit into memory) and tensor. slices: groups joined by a slower network; 0: as the devices report.
    config.mesh = dict(data=-1, fsdp=0, tensor=1, slices=0)

    config.model = model(at, remat="none" if size in ("tiny", "small") else "auto")
    config.update(objective(at))
    config.optimizer = optimizer(at)
    config.data = data(at)
    config.update(run(at))
    config.update(tools())
    return config.lock()


def model(at: types.SimpleNamespace, *, remat: str) -> dict[str, Any]:
    """The encoders."""
    return dict(
        dim=at.dim,  # joint space; paper: 256
        pool="cls",  # what is projected there: the state of [CLS] (paper) | "mean" of all others in the image, of all in the text
        dtype=at.dtype,  # compute; parameters, softmax, transport and losses stay float32
        remat=remat,  # what the backward pass recomputes: "none" | "dots", all but products | "blocks", all | "auto": as little as fits
        scan_unroll=at.scan_unroll,  # blocks per scan iteration, 1 with remat; 1 compiles fastest, all at once run a third faster on a CPU
        attention="auto",  # "xla", "cudnn", or "auto": cudnn on a GPU in bfloat16
        image=dict(
            **at.image,  # ViT
            stem="patch",  # a product of each patch's pixels (ViT) | "conv", convolutions in front (Xiao et al. 2021)
            mlp_width=0,  # inside the feed-forward part; 0: four times the width (ViT)
            layer_norm_eps=1e-6,  # ViT
            init_std=at.image_init_std,  # of initial matrices; ViT: 0.02; ours: wider in a narrow encoder
            position_std=at.position_std,  # of initial position embeddings; ViT: 0.02; ours: positions matter in a short run
        ),
        text=dict(
            # max_tokens: ALBEF 30; tiny 24 holds every caption of `scenes`. fusion_depth 0: no fusion
            # encoder, and so no matching, masked words or re-ranking
            **at.text,
            mlp_width=0,  # inside the feed-forward part; 0: four times the width (BERT)
            layer_norm_eps=1e-12,  # BERT
            init_std=at.text_init_std,  # of initial matrices, also in fusion encoder and heads; BERT: 0.02; ours
            value_std=at.value_std,  # of initial attention values and outputs in the text encoder; BERT: 0.02; ours
            embedding_std=at.embedding_std,  # of initial word, position and segment embeddings; BERT: 0.02; ours
            position_std=0.0,  # of those of positions and segments, if another than that; 0: the same
            dropout=at.dropout,  # on hidden states, BERT: 0.1; tiny: short runs underfit
        ),
    )


def objective(at: types.SimpleNamespace) -> dict[str, Any]:
    """What is learned."""
    return dict(
        # paper: a plain sum
        losses=dict(alignment=1.0, codebook=1.0, matching=1.0, masked_lm=1.0),
        alignment=dict(
            intra_weight=1.0,  # paper: intra-modal terms; 0 is ALBEF's ITC
            same_image="ignore",  # other captions of one image in batch and queue: "ignore" (ours: they match) | "negative" (ALBEF)
            temperature=0.07,  # ALBEF: learned from here
            temperature_min=0.001,  # ALBEF
            temperature_max=0.5,  # ALBEF
        ),
        codebook=dict(
            size=at.codes,  # paper: 4000; 0, with losses.codebook=0: none
            temperature=0.1,  # gamma; SwAV
            solver="sinkhorn",  # "sinkhorn" (ours: deterministic cost) | "ipot" (paper) | "swav" | "unbalanced" | without transport: "nearest" | "softmax"
            epsilon=0.05,  # Sinkhorn's, absolute; SwAV
            iterations=50,  # ours: 20 leave column errors of 1.5 % on trained features
            ipot_beta=0.5,  # IPOT's proximal weight; beta / iterations acts as epsilon
            swav_iterations=3,  # sweeps of "swav"; SwAV
            tau=0.9,  # "unbalanced": 1 pulls codewords to equal mass as "sinkhorn", 0 not at all; ours
            decay=0.99,  # "nearest": of the running means that codewords are; VQ-VAE
            move_unused_after=100,  # "nearest": steps after which an unused codeword moves to the worst-served feature; ours
            softmax_temperature=0.04,  # "softmax": of the teacher's soft codes; DINO
            center_momentum=0.9,  # "softmax": of the centre that keeps all codewords in play; DINO
            queue_samples=0,  # newest teacher features of the queue added to the transport problem; SwAV: when batch << codes
            freeze_steps=0,  # steps before the codebook itself learns; SwAV
            window_samples=16_384,  # codeword usage is counted over these
        ),
        teacher=dict(
            use=True,  # false: none is kept, and the student's own features are the candidates (CLIP)
            momentum=at.momentum,  # paper: 0.995
            momentum_ramp=at.momentum_ramp,  # min(momentum, (1+s)/(10+s)): ours, short runs cannot wait 1/(1-m) steps
            alpha=0.4,  # weight of soft targets; ALBEF
            alpha_steps=-1,  # linear from 0 over these; -1: one epoch (ALBEF)
        ),
        queue=dict(
            size=at.queue,  # 0: none; ALBEF: 65 536; tiny 64, ours: a short run learns sooner without old features
            ids=True,  # it keeps the images' ids, so that alignment.same_image holds for it too; ours: else a queue longer than an epoch is full of matches
        ),
        # negatives are drawn inside equal groups; 0: data shards x accumulation (ALBEF: one per GPU)
        itm=dict(
            groups=0, negatives="hard"
        ),  # "hard": the more alike, the likelier (ALBEF) | "random"
        mlm=dict(
            probability=0.15,  # BERT
            max_share=0.25,  # most masked positions per text, as a share of max_tokens; ours: fixed shapes
            mask_share=0.8,  # BERT
            random_share=0.1,  # BERT
        ),
    )


def optimizer(at: types.SimpleNamespace) -> dict[str, Any]:
    """AdamW or Muon, with a warm-up and a cosine."""
    return dict(
        name="adamw",  # ALBEF | "muon" (Jordan 2024): orthogonal steps for matrices inside the network, AdamW for the rest
        muon_learning_rate=0.02,  # "muon": peak for those matrices; Jordan
        learning_rate=at.learning_rate,  # peak; ALBEF: 1e-4
        learning_rate_ends=at.learning_rate_ends,  # where warm-up starts and cosine ends; ALBEF: 1e-5
        warmup_steps=at.warmup_steps,  # ALBEF: 2000
        weight_decay=0.02,  # ALBEF
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        clip_norm=0.0,  # global gradient norm; 0: off (ALBEF)
        freeze="",  # parameters that are not trained, by a regular expression for their names, as in ^towers/(image|text)/
        layer_decay=1.0,  # factor of the rate a layer further down; BEiT fine-tunes with 0.65 to 0.9, ALBEF with 1
        accumulation=1,  # passes per step; the gradient is that of one pass when itm.groups is the same
        max_bad_steps=10,  # non-finite steps in a row before the run stops
    )


def data(at: types.SimpleNamespace) -> dict[str, Any]:
    """The pairs, their words and their augmentation."""
    return dict(
        train="scenes",  # SCHEME:PLACE[?OPTION=VALUE&...], for example json:pairs.json; commas mix several (docs/data.md)
        eval="scenes",  # validation during training, and `--mode=eval` (for `scenes`: its test split) ...
        test="",  # ... unless this names another source
        image_root="",  # folder of listed files; empty: the list's own folder
        path_map="",  # OLD=NEW,...: replaces the beginning of listed paths with a folder of this machine
        damaged_shards="refuse",  # "refuse" | "skip" parts of records: or webdataset: that are missing, truncated, repeated or not UTF-8
        scenes_examples=at.examples,  # scenes per epoch
        global_batch=at.batch,  # pairs per step over all devices; paper: 512
        # so many pairs of alike captions side by side, so that negatives are hard; 0: off (GRIT-VLP, Byun et al. 2022; ours by words)
        alike=0,
        alike_window=64,  # batches that they are taken from, at most an epoch; the first so many stay as they are
        tokenizer="",  # folder or hub name; empty: byte-level BPE trained on the training captions
        tokenizer_vocabulary=8192,  # largest size of a trained one
        tokenizer_lowercase=True,  # of a trained one: A is a; ALBEF
        tokenizer_strip_accents=False,  # of a trained one: é is e, and Hindi loses its vowel signs; ours: words stay apart
        teacher_view="independent",  # paper: its own augmented view | "same" (ALBEF)
        # share of the area kept; ALBEF 0.2-1, but small crops remove what a scene's caption names
        crop_scale=(0.7, 1.0),
        crop_ratio=(0.75, 4 / 3),  # ALBEF
        flip=False,  # ALBEF flips; scenes, emoji and text in images must not
        randaugment_layers=0,  # ALBEF: 2; shear, translate and rotate can make a scene's relations false
        randaugment_magnitude=7,  # ALBEF, of 10
        workers=0,  # processes; 0: threads only
        threads=at.threads,  # per process
        prefetch=at.prefetch,  # batches read ahead
        patience_s=600.0,  # longest wait for a batch: then the run saves and exits; it warns every tenth of it
        max_bad_rate=0.01,  # share of unreadable images above which training stops
    )


def run(at: types.SimpleNamespace) -> dict[str, Any]:
    """How long to train, and when to evaluate and to save."""
    return dict(
        train=dict(
            steps=at.steps,  # base: 30 epochs (paper) of the built-in data
            epochs=0.0,  # passes over the data instead of that number of steps; 0: that number
            memory_check=True,  # stop at start if the compiled step does not fit into a device's memory
        ),
        evaluation=dict(
            every_steps=at.evaluate_every_steps,  # 0: only at the end; -1: every epoch
            images=-1,  # most images in validation; 0: all; -1: 1 000, and 32 above `tiny` on a CPU. --mode=eval takes all
            batch=at.evaluation_batch,
            rerank_top_k=at.rerank_top_k,  # candidates that the matching head re-ranks; ALBEF: 128 Flickr30K, 256 COCO; 0: none
            rerank_on_schedule=False,  # also during training
            prompts=(
                "a picture of a {}",
                "an image of a {}",
                "a {}",
            ),  # for images with labels, without training on them (CLIP)
            between=(),  # shares of the way from the weights of `init` to the trained ones, tried at the end (Wortsman et al. 2022)
            rerank_score="logit",  # of "match" (ALBEF) | "log_odds": its difference to the other
            rerank_dual_weight=0.0,  # of the dual encoder's similarity over the temperature, added to it; ALBEF: 0
        ),
        checkpoint=dict(
            every_steps=at.save_every_steps,
            keep=3,  # newest ones; the best in validation is kept too
        ),
    )


def tools() -> dict[str, Any]:
    """Export, packing and the check of data."""
    return dict(
        export=dict(
            format="codis",  # "codis", for codebook_jax.load | "huggingface", ViTModel and BertModel | "albef", for its code
            teacher=False,  # codis: adds the teacher's encoders; doubles the folder
            between=1.0,  # share of the way from the weights of `init` to the trained ones
        ),
        prepare=dict(
            source="",  # what --mode=prepare packs; empty: data.train
            role="train",  # "train" | "validation" | "test": split of the source; the last two get one record per image
            side_px=512,  # longest allowed shorter side; 0: keep every picture as it is
            quality=95,  # of re-encoded JPEGs; those small enough are kept as they are
            shard_records=4096,  # source records per shard
            processes=0,  # 0: one per CPU
            beam_runner="",  # DirectRunner, DataflowRunner, ...: Apache Beam instead of local processes
            beam_options="",  # for Beam, for example "--project=NAME --region=NAME"
        ),
        check=dict(
            processes=0,  # 0: one per CPU
            decode=True,  # decode every picture; false: only check that it is there
            least_side_px=32,  # pictures with a smaller shorter side count as tiny
            near_bits=3,  # perceptual hashes of near-duplicates differ in at most so many of 64 bits
            max_bad_share=0.05,  # exit code 1 above this share of unusable records, or of evaluation images in training
        ),
    )
