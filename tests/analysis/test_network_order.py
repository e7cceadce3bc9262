import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers.parameters import some_quick

from medmerge_jax.merging import init_coefficients, is_conv_kernel, network_order
from medmerge_jax.merging.trees import flatten
from medmerge_jax.models import create_model


@pytest.mark.parametrize(
    "name", some_quick(("resnet20", "resnet18", "resnet50", "densenet121"), "resnet20", "resnet18")
)
def test_order_of_the_paths_is_the_order_of_the_calls(name):
    model, images = create_model(name, num_classes=3), jnp.zeros((1, 64, 64, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    params = flatten(variables["params"])
    called = []

    def record(call, args, kwargs, context):
        path = "/".join((*context.module.path, "kernel"))
        if context.method_name == "__call__" and path in params:
            called.append(path)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda v: model.apply(v, images, train=False), variables)
    convolutions = [path for path in called if is_conv_kernel(path, params[path])]
    paths = flatten(init_coefficients(variables["params"]))
    assert sorted(sorted(paths), key=network_order) == convolutions
