"""transformers' image processor on PIL, by one name: it needs no torchvision, which has no CPU build everywhere."""

try:
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
except ImportError:  # before transformers 5.4 it was the one without a suffix
    from transformers.models.blip.image_processing_blip import BlipImageProcessor as BlipImageProcessorPil

__all__ = ["BlipImageProcessorPil"]
