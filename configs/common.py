"""All config fields, each defined once, and the recipes that set them.

A config file names a network; a colon and a recipe may follow (default: `paper`), and
flags can then change any field:

    python -m resnet_jax.main --config=configs/v1_20.py:keras --config.epochs=10
"""

from ml_collections import ConfigDict

from resnet_jax import UserError, did_you_mean


def get_config(
    recipe: str, version: int, depth: int, *, own_recipes=(), **model
) -> ConfigDict:
    """The config of a network under a recipe; `model` sets more of `config.model`.

    `own_recipes` are further recipes, by name, that only one config file has.
    """
    recipes = RECIPES | dict(own_recipes)
    if recipe not in recipes:
        raise UserError(
            f"recipe {recipe!r} is not known: {did_you_mean(recipe, recipes)}"
            f"choose one of {', '.join(recipes)}"
        )
    config = default()
    config.model.update(version=version, depth=depth, **model)
    recipes[recipe](config)
    return config


def default() -> ConfigDict:
    """All fields. A feature that a comment calls 'off' costs nothing at run time."""
    config = ConfigDict()
    config.seed = 0
    config.seeds = 1  # number of runs, with `seed` and the seeds that follow it
    config.epochs = 164  # 0: only evaluates the weights that `init_from` names
    config.steps = 0  # 0: `epochs` decides; positive: this many updates instead
    config.batch_size = 128  # over all devices
    config.steps_per_call = 0  # updates in one call; 0: 10 on a CPU, else 100
    # In epochs; the last one and those that checkpoint.every saves are evaluated too.
    config.eval_every = 1
    config.parallel = "jit"  # BatchNorm over the whole batch; 'pmap': per device
    config.label_smoothing = 0.0
    config.test_time_flip = False  # True: evaluate an image and its mirror image
    config.init_from = ""  # to fine-tune: a run's directory or .safetensors file
    config.profile = False  # trace the second call; print its costliest operations

    config.model = ConfigDict()
    config.model.version = 1
    config.model.depth = 20
    config.model.variant = "paper"  # 'keras': the network of the Keras example
    config.model.block = ""  # '': the version's own; else 'basic', 'bottleneck'
    config.model.activation = ""  # '': the version's own; else 'post', 'pre'
    config.model.shortcut = ""  # '': the version's own; 'A': zero-padded, 'B': 1x1
    config.model.residual = True  # False: the plain network, without shortcuts
    config.model.stem = "cifar"  # 'imagenet': stride 4, four stages; for large images
    config.model.width = 0  # channels of the stem; 0: 16, or 64 with stem 'imagenet'
    config.model.stochastic_depth = 0.0  # chance of dropping the last block; 0: off
    config.model.zero_init = False  # True: blocks begin as the identity
    config.model.dtype = "float32"  # of the computation; 'bfloat16' for GPU and TPU
    config.model.scan = False  # loop over identical blocks: compiles fast at any depth
    # Saves memory at the cost of one more forward pass; on a CPU, only with `scan`.
    config.model.remat = False

    config.dataset = ConfigDict()
    config.dataset.name = "cifar10"
    config.dataset.path = ""  # of your own pictures, with name 'image_folder'
    config.dataset.split_seed = 0  # of its test set, if no folder holds one
    config.dataset.data_dir = ""  # '': $TFDS_DATA_DIR, else ~/tensorflow_datasets
    config.dataset.mirror = ""  # base URL of the archive; '': the official host
    config.dataset.image_size = 0  # pixels to resize to; 0: as stored
    config.dataset.stream = "auto"  # above 2 GiB of pixels; or 'always', 'never'
    config.dataset.train_split = "train"
    config.dataset.validation_split = ""  # for model selection: 'train[45000:]'
    config.dataset.eval_split = "test"  # reported at the end

    config.augment = ConfigDict()
    config.augment.normalization = "pixel_mean"  # or per channel: 'mean', 'mean_std'
    # For 'mean_std', per channel, of pixels from 0 to 1; (): from the training set.
    config.augment.mean = ()
    config.augment.std = ()
    config.augment.crop = 0.125  # padding per side / image size (4 of 32); 0: off
    config.augment.random_resized_crop = 0.0  # smallest fraction of the area; 0: off
    config.augment.shift = 0.0  # Keras's shift / image size; 0: off
    config.augment.flip = True  # left to right, half of the images
    config.augment.alternating_flip = False  # True: each image every other epoch
    config.augment.cutout = 0.0  # side of a blank square / shorter side; 0: off
    config.augment.mixup = 0.0  # alpha of the mixing weights' Beta distribution; 0: off
    config.augment.cutmix = 0.0  # the same, but pasting rectangles; 0: off
    config.augment.plain_epochs = 0.0  # at the end, without mixup and cutmix
    # Smaller image sizes to train on first, as pixels of the shorter side.
    config.augment.sizes = ()
    config.augment.size_ends = ()  # when each of these ends, as a fraction of the run

    config.optimizer = ConfigDict()
    # sgd adam adamw rmsprop adagrad adadelta lars lion
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.linear_rate_batch = 0  # batch size that the rate is for; 0: any
    config.optimizer.momentum = 0.9  # for sgd, lars and rmsprop
    config.optimizer.nesterov = False  # for those too, and for adam and adamw: NAdam
    config.optimizer.epsilon = 1e-8  # for adam, adamw and rmsprop
    config.optimizer.weight_decay = 1e-4  # its gradient is weight_decay * parameter
    config.optimizer.decay = "coupled"  # or 'decoupled', as adamw and lion always are
    config.optimizer.decay_on = "all"  # or only 'kernels', or only 'convolutions'
    config.optimizer.clip_norm = 0.0  # largest global norm of the gradient; 0: off
    config.optimizer.freeze = ""  # regex of what to freeze: '^stem|^stage1'; '': none
    config.optimizer.backbone_factor = 1.0  # scales the rate of all but the classifier
    # Scales the rate of BatchNorm's biases, but not their decay.
    config.optimizer.bn_bias_factor = 1.0
    # Decay of the exponential moving average (EMA) of the weights, which is then what
    # is evaluated; at most (1+t)/(10+t) after t updates. 0: off.
    config.optimizer.ema = 0.0
    # Parts of a batch to accumulate gradients over; BatchNorm sees one at a time.
    config.optimizer.accumulate = 1

    config.schedule = ConfigDict()
    config.schedule.name = "step"  # or 'cosine', 'onecycle', 'constant'
    config.schedule.boundaries = (0.5, 0.75)  # of 'step', as fractions of the run
    config.schedule.factors = (0.1, 0.01)  # of the learning rate after each boundary
    config.schedule.warmup_epochs = 0.0
    config.schedule.warmup = "linear"  # up from the factor, or 'constant' at it
    config.schedule.warmup_factor = 0.1

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 10  # epochs; the end of the run is always saved
    config.checkpoint.every_minutes = 10.0  # also, however long an epoch is; 0: off
    config.checkpoint.keep = 2  # newest ones; the best by validation is kept too
    return config


def completed(stored: dict) -> ConfigDict:
    """A config as stored in JSON, with fields added since then at 'off'."""
    config = ConfigDict(stored)
    model = config.get("model")
    if (
        isinstance(model, ConfigDict)
        and "stem" not in model
        and model.get("width") == 16
    ):
        model.width = 0  # the default before there were other stems
    for name, value in default().items():
        is_group = isinstance(value, ConfigDict)
        if is_group and isinstance(config.get(name), ConfigDict):
            for inner in set(value) - set(config[name]):
                config[name][inner] = value[inner]
        # Without a `model` group it is not old, but damaged.
        elif name not in config and (not is_group or isinstance(model, ConfigDict)):
            config[name] = value
    return config


def paper(config: ConfigDict) -> None:
    """He et al. 2015, section 4.2, and 2016, appendix: about 64,000 updates.

    Whether it warms up depends on the config file's depth, as in 2015 (2016 always
    does); a depth given on the command line comes too late to change that.
    """
    if config.model.depth >= 110:
        # "We use 0.01 to warm up the training ... (about 400 iterations)".
        config.schedule.warmup_epochs = 400 * 128 / 50000
        config.schedule.warmup = "constant"


def keras(config: ConfigDict) -> None:
    """The Keras example cifar10_resnet.py, its network included.

    Optax adds Adam's epsilon after correcting the second moment's bias, Keras before,
    which gives it more weight in the first updates.
    """
    config.epochs = 200
    config.batch_size = 32
    config.model.variant = "keras"
    config.augment.update(crop=0.0, shift=0.1)
    config.optimizer.update(name="adam", learning_rate=1e-3, epsilon=1e-7)
    # l2(1e-4) adds 1e-4 * w^2 to the loss: its gradient is 2e-4 * w.
    config.optimizer.update(weight_decay=2e-4, decay_on="convolutions")
    # The example compares `epoch > 80` and so on, counting from 0.
    config.schedule.boundaries = (81 / 200, 121 / 200, 161 / 200, 181 / 200)
    config.schedule.factors = (0.1, 0.01, 0.001, 0.0005)


def strong(config: ConfigDict) -> None:
    """200 epochs with what improves the accuracy of these networks most."""
    config.epochs = 200
    config.augment.update(normalization="mean_std", alternating_flip=True)
    config.augment.update(mixup=0.2, plain_epochs=15.0)
    config.optimizer.update(nesterov=True, weight_decay=5e-4, ema=0.999)
    config.schedule.update(name="cosine", warmup_epochs=5.0)


def fast(config: ConfigDict) -> None:
    """The most accuracy within minutes: small images first, one cycle of a high rate.

    Set `epochs` to fit the time available.
    """
    config.epochs = 16
    config.label_smoothing = 0.1
    config.test_time_flip = True
    config.augment.update(normalization="mean_std", alternating_flip=True)
    config.augment.update(sizes=(16, 24), size_ends=(0.35, 0.7))
    config.optimizer.update(learning_rate=0.4, nesterov=True, weight_decay=5e-4)
    config.schedule.name = "onecycle"


def smoke(config: ConfigDict) -> None:
    """A minute on a laptop: real digits, 8x8 pixels, no download."""
    config.dataset.name = "digits"
    config.batch_size = 64
    config.epochs = max(1, 20 * 56 // max(config.model.depth, 56))
    config.augment.update(normalization="mean_std", flip=False)
    config.optimizer.nesterov = True
    config.schedule.update(name="cosine", warmup_epochs=config.epochs / 20)


RECIPES = {recipe.__name__: recipe for recipe in (paper, keras, strong, fast, smoke)}
