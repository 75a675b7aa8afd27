"""Networks: plain torch, chosen by name. They know nothing of what their output means."""

from genfw.nets.classifier import NoisyClassifier
from genfw.nets.conv import Conv, ConvDecoder, ConvEncoder
from genfw.nets.embedding import Fourier, sinusoidal
from genfw.nets.ladder import Ladder
from genfw.nets.mlp import MLP, MLPDecoder, MLPEncoder
from genfw.nets.network import Decoder, DenoisingNetwork, Encoder, Network
from genfw.nets.unet import UNet

__all__ = [
    "MLP",
    "Conv",
    "ConvDecoder",
    "ConvEncoder",
    "Decoder",
    "DenoisingNetwork",
    "Encoder",
    "Fourier",
    "Ladder",
    "MLPDecoder",
    "MLPEncoder",
    "Network",
    "NoisyClassifier",
    "UNet",
    "sinusoidal",
]
