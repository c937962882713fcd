"""How does a change become bytes where the blocks lie? On a GPU, by the kernels; the bytes are the protocol's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedblocks.kernels.ops import delta_encode
from fedblocks.profiles.model_shape import TensorSpec
from fedblocks.protocol.errors import LocalProtocolError
from fedblocks.protocol.tensors import EncodedTensor, FloatArray, Rows, encoded_rows, max_rows_sent


def device_encoder(
    ends: Callable[[int, str], tuple[Tensor, Tensor]], *, density: float, cap: float
) -> Callable[[int, TensorSpec, FloatArray | None], EncodedTensor]:
    """For ``protocol.tensors.encode_delta``: int8 rows of ``end - start`` plus what is owed within ±cap.

    Only codes, scales and the new residual leave the device.

    Args:
        ends: (block id, tensor name) -> trained value and start value, fp32 on the device, in the tensor's shape.

    Raises:
        LocalProtocolError (the encoder): a value that is not finite.
    """

    def encode(block: int, spec: TensorSpec, owed: FloatArray | None) -> EncodedTensor:
        end, start = (value.reshape(spec.rows_cols).contiguous() for value in ends(block, spec.name))
        residual = None
        if owed is not None:
            residual = torch.from_numpy(np.ascontiguousarray(owed)).reshape(spec.rows_cols).to(end.device)
        try:
            found = delta_encode(end, start, residual, max_rows=max_rows_sent(spec, density), cap=cap)
        except ValueError as error:
            raise LocalProtocolError(f"block {block}, {spec.name}: {error}") from error
        rows = Rows(index=found.index.cpu().numpy(), scales=found.scale.cpu().numpy(), values=found.codes.cpu().numpy())
        return encoded_rows(spec, rows, residual=found.residual.cpu().numpy().reshape(spec.shape), density=density)

    return encode
