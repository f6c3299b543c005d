"""GGUF files of tiny models."""

from tests.support.tiny import tokenizer


def write(path, model, *, quantised=False, extra=None, fields=None, merged=False):
    """Writes a model as llama.cpp's converter does: Llama's queries and keys in its order of rotary halves.

    `extra` are further tensors by name, `fields` further words of the header. With `merged`
    its tokenizer can be made of it: the last token is "12", of "1" and "2", the first "<|endoftext|>".
    """
    import gguf

    c = model.config
    writer = gguf.GGUFWriter(path, c.model_type)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    tokens = sorted((i, t) for t, i in tokenizer().get_vocab().items())
    words = [t for _, t in tokens]
    if merged:
        # GPT-2's tokenizer has an end of its own, which it would add
        words[0], words[-1] = "<|endoftext|>", "12"
        writer.add_token_merges(["1 2"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if i < 3 else 1 for i, _ in tokens])
    for name, text in (fields or {}).items():
        writer.add_string(name, text)
    writer.add_bos_token_id(1), writer.add_eos_token_id(2), writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, c.model_type.upper()), c.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        array = tensor.float()
        if c.model_type == "llama" and ("q_proj" in key or "k_proj" in key):
            heads = c.num_attention_heads if "q_proj" in key else c.num_key_value_heads
            array = array.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(array.shape)
        name, array = names.get_name(key, try_suffixes=(".weight", ".bias")), array.contiguous().numpy()
        if quantised and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
