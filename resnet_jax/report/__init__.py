"""Files of a run to look at: `curves.png` and `report.html`."""

from resnet_jax.report.curves import draw_curves as draw_curves
from resnet_jax.report.page import update as update
