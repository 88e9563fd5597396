"""Which of transformers' Auto classes loads a model: that of causal LMs, or, where it does not know the config's class,
that of models which also read images. Of the latter the text model is what amq works on; the rest stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amq.util.extras import needs

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

CAUSAL, IMAGES = "AutoModelForCausalLM", "AutoModelForImageTextToText"


def auto_name(config: Any) -> str:
    """The Auto class's name for a config that AutoConfig has read."""
    with needs("models", "opening a model through transformers"):
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return CAUSAL
    own = getattr(config, "auto_map", None) or {}
    known = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or (IMAGES in own and CAUSAL not in own)
    return IMAGES if known else CAUSAL


def auto_class(config: Any, name: str | None = None) -> Any:
    """That class, or the one of that `name`; for a config that none knows causal LMs', whose error says so."""
    import transformers

    return getattr(transformers, name or auto_name(config))


def text_part(model: nn.Module) -> nn.Module:
    """The decoder inside a model that also reads something else than text; any other model itself."""
    config: Any = getattr(model, "config", None)
    get_text = getattr(config, "get_text_config", None)
    if get_text is None or get_text() is config or not hasattr(model, "get_decoder"):
        return model
    found: nn.Module = model.get_decoder()  # type: ignore[operator]
    return found


def other_parts(model: PreTrainedModel) -> dict[str, nn.Module]:
    """{path: module} of what has neither the decoder nor the embedding nor the head in it: encoders of images and what
    leads from them to the decoder; none of a model of text."""
    decoder = text_part(model)
    if decoder is model:
        return {}
    own = {decoder, model.get_input_embeddings(), model.get_output_embeddings()}
    found: dict[str, nn.Module] = {}

    def look(path: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            if child in own:
                continue
            if own.isdisjoint(child.modules()):
                found[f"{path}{name}"] = child
            else:
                look(f"{path}{name}.", child)

    look("", model)
    return found
