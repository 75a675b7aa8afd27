"""A Bernoulli decoder begins at the mean training image, and a resumed one where it was."""

import pytest
import tiny
import torch

import genfw
from genfw.nets import MLPDecoder, MLPEncoder
from genfw.train.callbacks import StartAtMean
from genfw.train.data import ImageData, Source, Split, Splits
from genfw.train.ema import EMA
from genfw.train.errors import GenfwError
from genfw.train.module import LatentModule


class Half(Source):
    """Four pixels that are 0, 64, 128 and 255 in every image."""

    def read(self, shape, path):
        images = torch.tensor([0, 64, 128, 255], dtype=torch.uint8).reshape(1, 1, 2, 2)
        split = Split(images.repeat(4, 1, 1, 1).numpy(), torch.zeros(4).long().numpy())
        return Splits(split, split, split)


def data() -> ImageData:
    return ImageData(Half(), (1, 2, 2), 2, 1, raw_bins=256, batch_size=2, binarize="dynamic")


def module(lr: float = 0.0) -> LatentModule:
    torch.manual_seed(0)
    shape = (1, 2, 2)
    vae = genfw.VAE(
        MLPEncoder(shape, 2, hidden=[4]),
        MLPDecoder(shape, 2, outputs=1, hidden=[4]),
        genfw.BernoulliLikelihood(),
        2,
    )
    return LatentModule(vae, genfw.Elbo(), lambda p: torch.optim.SGD(p, lr=lr))


def bias(model) -> torch.Tensor:
    return model.decoders[0].layers[-1].bias.detach().clone()


def test_bias_is_the_logit_of_the_mean(tmp_path):
    trained = module()
    callbacks = [EMA(), StartAtMean()]
    tiny.trainer(tmp_path, 1, callbacks=callbacks, limit_val_batches=0).fit(trained, data())
    mean = torch.tensor([0.001, 64 / 255, 128 / 255, 0.999])
    torch.testing.assert_close(bias(trained.model).sigmoid(), mean)
    torch.testing.assert_close(bias(trained.average).sigmoid(), mean)


def test_weights_of_a_checkpoint_win(tmp_path):
    first = module(lr=1.0)
    trainer = tiny.trainer(tmp_path, 2, callbacks=[StartAtMean()], limit_val_batches=0)
    trainer.fit(first, data())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    restored = module(lr=1.0)
    tiny.trainer(tmp_path, 3, callbacks=[StartAtMean()], limit_val_batches=0).fit(
        restored, data(), ckpt_path=tmp_path / "two.ckpt", weights_only=True
    )
    once = module(lr=1.0)
    tiny.trainer(tmp_path, 3, callbacks=[StartAtMean()], limit_val_batches=0).fit(once, data())
    assert (bias(restored.model) == bias(once.model)).all()


def test_other_models_are_refused(tmp_path):
    with pytest.raises(GenfwError, match=r"^StartAtMean: expected .*, got VDM: remove"):
        tiny.trainer(tmp_path, 1, callbacks=[StartAtMean()]).fit(tiny.module(), data())
