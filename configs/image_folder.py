"""Your own pictures: ResNet version 1, depth 20, at 32 pixels; or depth 18 at 224.

    python -m resnet_jax.main --config=configs/image_folder.py --config.dataset.path=DIR

269,722 parameters (10 classes). `--config=configs/image_folder.py:imagenet` has
11,181,642 and wants a GPU or TPU. DIR has a folder of pictures for each class, or
train/ with such folders in it, and val/ or test/ beside it.
"""

from configs import common


def get_config(recipe="paper"):
    config = common.get_config(recipe, version=1, depth=20, own_recipes=RECIPES)
    config.dataset.name = "image_folder"
    config.dataset.image_size = config.dataset.image_size or 32
    return config


def imagenet(config):
    """ResNet-18 at 224 pixels by fb.resnet.torch's schedule, in batches of 128.

    Without its colour jitter and lighting; and crops come from the middle square at
    224 pixels, not the whole picture, so that published accuracies are out of reach.
    """
    config.epochs = 90
    config.model.update(depth=18, stem="imagenet")
    config.dataset.image_size = 224
    config.augment.update(normalization="mean_std", crop=0.0, random_resized_crop=0.08)
    config.optimizer.update(learning_rate=0.05, nesterov=True)
    config.schedule.boundaries = (1 / 3, 2 / 3)


RECIPES = {"imagenet": imagenet}
