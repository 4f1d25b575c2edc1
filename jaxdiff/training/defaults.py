"""What the configs have in common: every setting with its default, so that a config says only what it changes."""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """All settings of train.py. Each may be changed on the command line: --config.batch_size=64."""
    return ConfigDict(
        {
            # "clip", "vae" or "unet"; "lora", "textual_inversion", "controlnet", "inpainting", "upscaler"
            "stage": "",
            # Optimisation: jaxdiff.training.state.Options.
            "steps": 10_000,
            "batch_size": 64,  # over all devices and hosts
            "accumulate": 1,  # parts that a batch is taken in, to save memory; may change on resuming, but for clip
            "learning_rate": 1e-4,
            "warmup_steps": 500,
            "schedule": "cosine",  # or "constant", "linear"
            "weight_decay": 0.01,
            "b1": 0.9,
            "b2": 0.99,
            "optimizer": "adamw",  # or adafactor, lion, muon
            "moments": "float32",  # of the optimizer: or bfloat16 (the first), int8 (both, adamw)
            "rates": (),  # factors of learning_rate by the start of a parameter's path: (("text_encoder", 0.1),)
            "clip_norm": 1.0,  # 0: off
            "ema_decay": 0.999,
            # Averages of which snapshots are kept, for one of any length after training: (0.05, 0.1).
            "ema_sigmas": (),
            "snapshot_every": 1000,
            "seed": 0,
            # The devices are a mesh ("data", "fsdp", "tensor"); "data" is what the other two leave.
            "fsdp": 1,  # devices that each parameter is kept split over
            "tensor": 1,  # devices that the layers themselves are split over
            "log_every": 50,
            "eval_every": 1000,  # 0: at the end only
            "checkpoint_every": 1000,
            "keep_checkpoints": 2,
            "max_skipped": 10,  # updates in a row that may be left out because loss or gradient is not finite
            "dtype": "float32",  # type to compute in; parameters that learn are float32
            "frozen_dtype": "float32",  # of those that do not learn: or bfloat16, float16, half the memory
            "remat": "",  # compute activations again in the backward pass, to save memory: full, dots or dots_no_batch
            # Diffusers folders, or names of bundled models, that parts come from with weights and sizes; "model" stands
            # for every part, and "vae" may be the folder of an autoencoder alone.
            "init_from": {"model": "", "text_encoder": "", "vision_encoder": "", "vae": "", "unet": ""},
            "data": {
                "path": "",
                "split": "train",
                "eval_split": "",  # pictures set aside; "": those of `split`
                "image_size": 128,  # pixels of a side; 0: the model's own
                "background": "random",  # of transparent pictures: random (and named in the caption) or white
                "flip": False,  # mirror at random
                "captions": (),  # of all pictures, in place of metadata.jsonl; {} stands for word.token
                "threads": 8,  # that read pictures
                "workers": 0,  # processes that read pictures; 0: the threads of this process
                "image_column": "",  # of Parquet, Arrow and ArrayRecord data; "": a usual name
                "text_column": "",
                # Sizes of one area at the pictures' own aspects, in multiples of so many pixels (64); 0: squares.
                "buckets": 0,
                "max_aspect": 2.0,
                # Allowed values by column of the metadata; an empty tuple allows all, max_subjects 0 as well.
                # (None,) allows those without the column, such as pictures of the icons set that were not recoloured.
                # The others: jaxdiff.data.filters.select.
                "filter": {
                    "style": (),
                    "source": (),
                    "subject": (),
                    "color": (),
                    "max_subjects": 0,
                    "min_side": 0,  # pixels
                    "max_aspect": 0.0,
                    "min_caption": 0,  # characters
                    "max_caption": 0,
                    "where": (),  # conditions on columns: ("aesthetic>=5", "license=CC0")
                    "duplicates": "",  # "exact": equal files; "near": alike in all but duplicate_bits of 64
                    "duplicate_bits": 4,
                },
            },
            "tokenizer": {"vocab_size": 4096, "max_length": 24},  # of a fresh text encoder
            "model": {},  # sizes of fresh parts: text_encoder, vision_encoder, vae, unet, scheduler
            # Stage "vae".
            "crop": 0,  # pixels of random squares to train on; 0: whole pictures, as all other stages learn
            "kl_weight": 1e-3,
            "edge_weight": 1.0,
            # Stage "unet" and those after it.
            "trainable": (
                "unet",
            ),  # or ("unet", "text_encoder", "text_encoder_2"): what learns, or what a LoRA changes
            "prediction_type": "",  # epsilon, v_prediction, sample or flow_prediction; "": the model's own
            "zero_terminal_snr": False,  # no signal at all at the last step; True turns it on
            # jaxdiff.training.stages.NoiseOptions.
            "caption_dropout": 0.1,
            "min_snr_gamma": 0.0,  # 0: off
            "offset_noise": 0.0,  # 0: off
            "input_perturbation": 0.0,  # 0: off
            "times": "uniform",  # or "logit_normal", of this mean and deviation
            "logit_mean": 0.0,
            "logit_std": 1.0,
            # Class pictures beside one's own, so that the class is not forgotten (DreamBooth): a folder, captioned, or
            # with these captions for all.
            "prior": {"path": "", "captions": (), "weight": 1.0},
            # Stage "lora"; alpha 0 is the rank; endings of the layers' names, () for the projections of attention.
            "lora": {"rank": 8, "alpha": 0.0, "layers": ()},
            # Stage "textual_inversion": the new word, the words that it starts from, and how many vectors it has.
            "word": {"token": "<word>", "initial": "", "vectors": 1},
            # Stage "controlnet": a ControlNet to go on from, "" for the UNet's own way down; thresholds of the edges.
            "controlnet": {"init_from": "", "canny_low": 100.0, "canny_high": 200.0},
            # What train.py --precompute wrote, and how it writes: views of every picture, the text embeddings too, and
            # pictures that a device encodes at a time, as for cache_latents.
            "latents": {"path": "", "views": 1, "embeddings": False, "batch_size": 8},
            "cache_latents": 0,  # encode so many views of every picture beforehand; 0: encode as they are read
            # Numbers also go to Weights & Biases (pip install jaxdiff[wandb]) where a project is named.
            "wandb": {"project": "", "name": ""},
            "eval": {
                # Number of held-out pictures: reconstructed (vae), ranked (clip), denoised (others, with
                # data.eval_split), or used as inputs for sample sheets.
                "pictures": 64,
                "prompts": (),
                "steps": 20,
                "guidance_scale": 0.0,  # 0: the model's own
                "scheduler": "dpmpp_2m",
                "seed": 0,
            },
        },
        convert_dict=True,
    )


def fine_tuning(stage: str) -> ConfigDict:
    """`base` for a stage that starts from a finished model (config.init_from.model), in mixed precision."""
    config = base()
    config.stage = stage
    config.init_from.model = "icons"
    config.data.image_size = 0  # the model's own
    config.data.background = "white"
    config.update({"remat": "full", "dtype": "bfloat16"})
    return config
