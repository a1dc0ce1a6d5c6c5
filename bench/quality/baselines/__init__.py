"""The baselines of the paper's Table 1, and two more, each in one file on the same interface (`base.Baseline`)."""

from .base import Baseline
from .ft import FineTuning
from .grace import Grace
from .ike import Ike
from .ke import Ke
from .lora import Lora
from .mend import Mend
from .serac import ImageAwareSerac, Serac
from .t_patcher import TPatcher

METHODS: dict[str, type[Baseline]] = {
    cls.name: cls for cls in (FineTuning, Ke, TPatcher, Mend, Ike, Serac, ImageAwareSerac, Grace, Lora)
}
