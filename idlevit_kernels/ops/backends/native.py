"""The ops over the native extension, written once for its CPU and its CUDA kernels.

Allocates outputs and hands addresses, sizes and strides to the extension.
"""

from __future__ import annotations

import abc
import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...errors import Words, value_error
from .. import reference
from ..dtypes import accumulate_dtype
from ..record import RECORDS
from . import token_cut_loss as tiles
from .backend import Backend, Kernel
from .build_info import build_info

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


@functools.cache
def extension() -> ModuleType | None:
    try:
        import idlevit_kernels._C as built

        return built
    except ImportError as error:
        if build_info().get("native"):  # built, yet it does not load: that is not a missing compiler
            raise ImportError(f"idlevit_kernels._C was built but does not load: {error}") from error
        return None


def missing() -> list[str]:
    """Why there is no extension; empty if there is one."""
    if extension() is None:
        return [f"the native extension is not built: {build_info().get('reason') or 'no build is recorded'}"]
    return []


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """x itself where its channels are contiguous, a copy otherwise; and its address."""
    if x.stride(2) != 1 and x.shape[2] > 1:
        address(x)  # before its elements are read
        x = x.contiguous()
    at = x.data_ptr()
    return x, at if at >= _LOW else address(x)


def dense(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """t contiguous and of the dtype, itself where it is both, found out without a call that would return it; and its
    address."""
    if t.dtype is not dtype or not t.is_contiguous():
        address(t)  # before its elements are read
        t = t.to(dtype).contiguous()
    at = t.data_ptr()
    return t, at if at >= _LOW else address(t)


_LOW = 1 << 32  # below it lies what is an offset from 0, or (rarely) a small heap


def address(t: Tensor) -> int:
    """Where its elements lie. A kernel takes 0 for a tensor that is left out, so one whose memory was freed (a storage
    resized to 0, as FSDP does) is refused here; a view of it has its offset for an address."""
    at = t.data_ptr()
    if at < _LOW and t.numel() and t.untyped_storage().nbytes() == 0:
        raise value_error("native kernel", "each tensor", "one with memory", Words("one whose storage was freed"))
    return at


Parameters = tuple[tuple[int, ...], list[int], list[Tensor]]
"""Of a norm, a LayerScale or a direction, as a kernel takes them: what it is told of the dtypes; addresses, 0 for None;
copies that the addresses lie in, to be kept until the kernel has run."""


def parameters(codes: tuple[int, ...], x: Tensor, dtype: torch.dtype, tensors: tuple[Tensor | None, ...]) -> Parameters:
    """The tensors [..., C] in the dtype. A kernel takes C from x alone; a narrower parameter would be read past its
    end."""
    channels = x.shape[-1]
    addresses, owners = [], []
    for t in tensors:
        if t is None:
            addresses.append(0)
            continue
        if t.shape[-1] != channels:
            raise value_error("native kernel", "a norm, gamma or direction", f"of C = {channels} channels", t)
        if t.dtype is not dtype or not t.is_contiguous():
            t, at = dense(t, dtype)
            owners.append(t)
        else:
            at = t.data_ptr()
            if at < _LOW:
                address(t)
        addresses.append(at)
    return codes, addresses, owners


class NativeBackend(Backend):
    """The ops of one family of kernels, a method each; a subclass says where they run, how one is called and what its
    result means."""

    # Chains of ops that a subclass may have one kernel for.
    fusions: frozenset[str] = frozenset()
    # Ops whose kernels hold a whole row, so that there is a widest one.
    row_ops = frozenset({"token_scores", "select_gather_norm", "gather_add_norm"})

    # Two small matrix products, and PyTorch's library has those.
    cls_direction = staticmethod(reference.cls_direction.reference)
    # Matrix products over tiles are what these are made of, and PyTorch's library has those.
    token_cut_loss = staticmethod(tiles.token_cut_loss)
    token_cut_loss_backward = staticmethod(tiles.token_cut_loss_backward)

    @property
    @abc.abstractmethod
    def max_channels(self) -> int: ...

    @abc.abstractmethod
    def parameters(self, x: Tensor, *tensors: Tensor | None) -> Parameters: ...

    @abc.abstractmethod
    def call(self, kernel: str, x: Tensor, *args: Any) -> Any:
        """Runs the kernel where x is; the result is true if it failed."""

    @abc.abstractmethod
    def error(self, op: str, failure: Any, indices: Tensor | None, num_tokens: int) -> Exception:
        """What to raise for a failed call."""

    def kernel(self, op: str) -> Kernel | None:
        return getattr(self, op, None) if op in RECORDS or op in self.fusions else None

    def architecture_reasons(self, device: torch.device) -> list[str]:
        """Why kernels that are installed do not run on this one of the machine's devices."""
        return []

    def reasons(self, op: str, args: tuple[Any, ...]) -> list[str]:
        found = [*self.installed(), *self.kernel_reasons(op), *self.device_reasons(args)]
        first = args[0]
        if first.dtype not in DTYPES:
            found.append(f"it knows float32, float64, float16 and bfloat16, not {first.dtype}")
        if not found:
            found += self.architecture_reasons(first.device)
            if op in self.row_ops and first.shape[2] > self.max_channels:
                found.append(f"it takes at most {self.max_channels} channels, not {first.shape[2]}")
        return found

    def token_scores(
        self, x: Tensor, direction: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
    ) -> Tensor:
        x, at_x = rows_of(x)
        types, (at_direction, *at_norm), _owners = self.parameters(x, direction, norm_weight, norm_bias)
        (B, T, C), (by_image, by_token, _) = x.shape, x.stride()
        scores = x.new_empty((B, T), dtype=accumulate_dtype(x.dtype))
        failure = self.call(
            "token_scores", x, *types, B, T, 0, C, at_x, by_image, by_token, at_direction, *at_norm, eps,
            scores.data_ptr(),
        )  # fmt: skip
        if failure:
            raise self.error("token_scores", failure, None, T)
        return scores

    def select_tokens(self, scores: Tensor, num_keep: int, num_prefix_tokens: int) -> Tensor:
        scores, at_scores = dense(scores, accumulate_dtype(scores.dtype))
        B, T = scores.shape
        indices = scores.new_empty((B, num_prefix_tokens + num_keep), dtype=torch.int64)
        failure = self.call(
            "select_tokens", scores, DTYPES[scores.dtype], B, T, indices.shape[1], 1, num_prefix_tokens, at_scores,
            indices.data_ptr(),
        )  # fmt: skip
        if failure:
            raise self.error("select_tokens", failure, None, T)
        return indices

    def select_gather_norm(
        self,
        x: Tensor,
        scores: Tensor,
        num_keep: int,
        num_prefix_tokens: int,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        (x, at_x), (scores, at_scores) = rows_of(x), dense(scores, accumulate_dtype(x.dtype))
        types, at_norm, _owners = self.parameters(x, norm_weight, norm_bias)
        (B, T, C), (by_image, by_token, _) = x.shape, x.stride()
        n = num_prefix_tokens + num_keep
        indices, normed = x.new_empty((B, n), dtype=torch.int64), x.new_empty((B, n, C))
        failure = self.call(
            "select_gather_norm", x, *types, B, T, n, C, num_prefix_tokens, at_x, by_image, by_token, at_scores,
            *at_norm, eps, indices.data_ptr(), normed.data_ptr(),
        )  # fmt: skip
        if failure:
            raise self.error("select_gather_norm", failure, None, T)
        return indices, normed

    def gather_tokens(self, x: Tensor, indices: Tensor) -> Tensor:
        (x, at_x), (indices, at_indices) = rows_of(x), dense(indices, torch.int64)
        (B, T, C), (by_image, by_token, _), n = x.shape, x.stride(), indices.shape[1]
        out = x.new_empty((B, n, C))
        failure = self.call(
            "gather_tokens", x, DTYPES[x.dtype], B, T, n, C, at_x, by_image, by_token, at_indices, out.data_ptr(),
        )  # fmt: skip
        if failure:
            raise self.error("gather_tokens", failure, indices, T)
        return out

    def gather_norm_backward(
        self, grad: Tensor, x: Tensor, indices: Tensor, norm_weight: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        acc = accumulate_dtype(x.dtype)
        row = self.gather_tokens(x, indices).to(acc)
        weight = None if norm_weight is None else dense(norm_weight, acc)[0]
        shape = row.shape[-1:]
        _, mean, rstd = torch.native_layer_norm(row, shape, weight, None, eps)
        ones = row.new_ones(shape) if weight is None else weight
        grad_row, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad.to(acc).contiguous(), row, shape, mean, rstd, ones, ones, [True, True, True]
        )
        return self.expand_tokens(grad_row.to(x.dtype), indices, x.shape[1]), grad_weight, grad_bias

    def gather_add_norm(
        self,
        x: Tensor,
        indices: Tensor,
        branch: Tensor,
        gamma: Tensor | None,
        scale: float,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        (x, at_x), (indices, at_indices) = rows_of(x), dense(indices, torch.int64)
        branch, at_branch = dense(branch, x.dtype)
        types, (at_gamma, *at_norm), _owners = self.parameters(x, gamma, norm_weight, norm_bias)
        (B, T, C), (by_image, by_token, _) = x.shape, x.stride()
        tokens, normed = torch.empty_like(branch), torch.empty_like(branch)
        failure = self.call(
            "gather_add_norm", x, *types, B, T, indices.shape[1], C, at_x, by_image, by_token, at_indices, at_branch,
            at_gamma, scale, *at_norm, eps, tokens.data_ptr(), normed.data_ptr(),
        )  # fmt: skip
        if failure:
            raise self.error("gather_add_norm", failure, indices, T)
        return tokens, normed

    def _scatter(
        self,
        op: str,
        source: tuple[Tensor, int] | None,
        indices: Tensor,
        tokens: Tensor,
        branch: Tensor | None,
        gamma: Tensor | None,
        scale: float,
        out: Tensor,
    ) -> None:
        """Writes into ``out``; the rows that no index names come from the source (``rows_of``), or are zero without."""
        (indices, at_indices), (tokens, at_tokens) = dense(indices, torch.int64), dense(tokens, out.dtype)
        branch, at_branch = (None, 0) if branch is None else dense(branch, out.dtype)
        types, (at_gamma,), _owners = self.parameters(out, gamma)
        (B, T, C), (by_image, by_token, _) = out.shape, out.stride()
        rows = (0, 0, 0) if source is None else (source[1], *source[0].stride()[:2])
        failure = self.call(
            "scatter_tokens", out, *types, B, T, indices.shape[1], C, *rows, at_indices, at_tokens, at_branch, at_gamma,
            scale, out.data_ptr(), by_image, by_token,
        )  # fmt: skip
        if failure:
            raise self.error(op, failure, indices, T)

    def _scatter_in_place(
        self,
        op: str,
        x: Tensor,
        indices: Tensor,
        tokens: Tensor,
        branch: Tensor | None,
        gamma: Tensor | None,
        scale: float,
    ) -> None:
        rows = rows_of(x)
        target = rows[0]
        self._scatter(op, rows, indices, tokens, branch, gamma, scale, target)
        if target is not x:
            x.copy_(target)

    def scatter_tokens(self, x: Tensor, indices: Tensor, tokens: Tensor) -> Tensor:
        out = x.new_empty(x.shape)
        self._scatter("scatter_tokens", rows_of(x), indices, tokens, None, None, 1.0, out)
        return out

    def scatter_tokens_(self, x: Tensor, indices: Tensor, tokens: Tensor) -> None:
        self._scatter_in_place("scatter_tokens_", x, indices, tokens, None, None, 1.0)

    def expand_tokens(self, tokens: Tensor, indices: Tensor, num_tokens: int) -> Tensor:
        out = tokens.new_empty((tokens.shape[0], num_tokens, tokens.shape[2]))
        self._scatter("expand_tokens", None, indices, tokens, None, None, 1.0, out)
        return out

    def scatter_add_tokens(
        self, x: Tensor, indices: Tensor, tokens: Tensor, branch: Tensor, gamma: Tensor | None, scale: float
    ) -> Tensor:
        out = x.new_empty(x.shape)
        self._scatter("scatter_add_tokens", rows_of(x), indices, tokens, branch, gamma, scale, out)
        return out

    def scatter_add_tokens_(
        self, x: Tensor, indices: Tensor, tokens: Tensor, branch: Tensor, gamma: Tensor | None, scale: float
    ) -> None:
        self._scatter_in_place("scatter_add_tokens_", x, indices, tokens, branch, gamma, scale)
