"""Small random classifiers, one for each architecture, with the architecture's usual type of tokenizer.

Tests make the classifiers on demand, so the repository stores none of them.
"""

import functools
from dataclasses import dataclass

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from toolchain.data import inputs

NARROW = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
# Token ids of [CLS], [SEP] and others, which ModernBERT and EuroBERT keep in their configs.
MODERN_TOKENS = {"cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
EURO_TOKENS = {"bos_token_id": 2, "eos_token_id": 3, "mask_token_id": 4}
TYPED = ("input_ids", "attention_mask", "token_type_ids")
PLAIN = TYPED[:2]
# In transformers 5, ALBERT's tokenizer gives no token types, so the exported model takes none.
ALBERT_INPUTS = PLAIN if transformers.__version__.startswith("5.") else TYPED

# --- tokenizers; each tokenizer is trained on the sentences of the validation set inside the package `toolchain`


def wordpiece(words, special=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        words, trainers.WordPieceTrainer(vocab_size=400, special_tokens=list(special), show_progress=False)
    )
    return add_template(tokenizer, special)


def byte_level(words):
    """Trains RoBERTa's kind of tokenizer, where <pad> is token 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def unigram(words, special=("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    unknown = next(token for token in special if "unk" in token.lower())
    trainer = trainers.UnigramTrainer(
        vocab_size=400, unk_token=unknown, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    return add_template(tokenizer, special)


albert_unigram = functools.partial(unigram, special=("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"))
# In MPNet and XLM-RoBERTa, <pad> is token 1.
mpnet_wordpiece = functools.partial(wordpiece, special=("<s>", "<pad>", "</s>", "[UNK]", "<mask>"))
xlm_unigram = functools.partial(unigram, special=("<s>", "<pad>", "</s>", "<unk>", "<mask>"))


def add_template(tokenizer, special):
    """Makes the tokenizer put [CLS] before and [SEP] after each text, or <s> and </s> if `special` has these."""
    first, last = ("[CLS]", "[SEP]") if "[CLS]" in special else ("<s>", "</s>")
    special_tokens = [(token, tokenizer.token_to_id(token)) for token in (first, last)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=special_tokens)
    return tokenizer


# --- architectures


@dataclass(frozen=True)
class Architecture:
    """An architecture, and the numbers of nodes that the passes must fuse or quantise in it.

    Attributes:
        stem: Start of the architecture's class names in transformers.
        tokenizer: Function that trains a tokenizer of the architecture's usual type.
        config: Settings of the transformers config.
        inputs: Names of the model's inputs.
        fused: Number of fused nodes in onnx-fp32, by operator.
        linear: Number of linear layers that onnx-int8 quantises.
        tables: Number of embedding tables that onnx-int8 quantises.
    """

    stem: str
    tokenizer: object
    config: dict
    inputs: tuple
    fused: dict
    linear: int
    tables: int


# Two BERT layers have two fused Attention nodes and two fused Gelu nodes. Each BERT layer has four linear layers: the
# packed projections of query, key and value, the attention output, and both linear layers of the FFN.
FUSED = {"Attention": 2, "Gelu": 2}
ARCHITECTURES = {
    "distilbert": Architecture(
        "DistilBert",
        wordpiece,
        {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128}
        | {"initializer_range": 0.3},
        PLAIN,
        FUSED,
        9,  # The 9 linear layers include the first layer of the classification head.
        2,
    ),
    "bert": Architecture("Bert", wordpiece, NARROW, TYPED, FUSED, 9, 3),
    "minilm": Architecture(  # MiniLM is a BERT with many narrow heads.
        "Bert",
        wordpiece,
        {**NARROW, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 12, "intermediate_size": 192},
        TYPED,
        {"Attention": 3, "Gelu": 3},
        13,
        3,
    ),
    "roberta": Architecture(
        "Roberta", byte_level, {**NARROW, "max_position_embeddings": 130, "type_vocab_size": 1}, PLAIN, FUSED, 9, 3
    ),
    "xlm-roberta": Architecture(
        "XLMRoberta", xlm_unigram, {**NARROW, "max_position_embeddings": 130, "type_vocab_size": 1}, PLAIN, FUSED, 9, 3
    ),
    # Unlike BERT, ELECTRA has a linear layer that projects the embeddings, and a Gelu in its classification head.
    "electra": Architecture(
        "Electra", wordpiece, {**NARROW, "embedding_size": 16}, TYPED, {"Attention": 2, "Gelu": 3}, 10, 3
    ),
    "albert": Architecture(
        "Albert",
        albert_unigram,
        {**NARROW, "embedding_size": 16, "num_hidden_layers": 6},
        ALBERT_INPUTS,
        {"Attention": 6, "FastGelu": 6},
        26,
        3,
    ),
    # No pass fuses the attention of DeBERTa, which projects tokens three times and positions twice.
    "deberta-v2": Architecture(
        "DebertaV2",
        unigram,
        {**NARROW, "type_vocab_size": 0, "relative_attention": True, "position_buckets": 16}
        | {"pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm"}
        | {"position_biased_input": False, "max_relative_positions": -1},
        PLAIN,
        {"Gelu": 3},
        17,
        1,
    ),
    # MobileBERT has bottlenecks, and no LayerNormalization from which a fusion pass could start.
    "mobilebert": Architecture(
        "MobileBert",
        wordpiece,
        {**NARROW, "hidden_size": 64, "embedding_size": 16, "intra_bottleneck_size": 32, "initializer_range": 0.1}
        | {"num_feedforward_networks": 2},
        TYPED,
        {},
        24,
        3,
    ),
    # In MPNet, each attention score gets a bias, which depends on the distance between the two tokens. No pass fuses
    # such attention.
    "mpnet": Architecture(
        "MPNet", mpnet_wordpiece, {**NARROW, "max_position_embeddings": 130}, PLAIN, {"Gelu": 2}, 13, 3
    ),
    # ModernBERT and EuroBERT rotate queries and keys, and normalise the input of each sub-block, not its output. Each
    # layer of ModernBERT has four linear layers, and its FFN has a gate.
    "modernbert": Architecture(
        "ModernBert",
        wordpiece,
        {key: value for key, value in NARROW.items() if key != "initializer_range"}
        | {"num_hidden_layers": 3, "global_attn_every_n_layers": 3, "local_attention": 16, **MODERN_TOKENS},
        PLAIN,
        {"Gelu": 4},
        13,
        1,
    ),
}
if hasattr(transformers, "EuroBertConfig"):  # transformers 4.57 does not know EuroBERT
    ARCHITECTURES["eurobert"] = Architecture(
        "EuroBert", wordpiece, {**NARROW, **EURO_TOKENS}, PLAIN, {"Gelu": 1}, 16, 1
    )
# Architectures whose variants in ONNX cannot be built
OTHERS = {
    "longformer": Architecture(
        "Longformer",
        byte_level,
        {
            **NARROW,
            "num_hidden_layers": 1,
            "max_position_embeddings": 66,
            "type_vocab_size": 1,
            "attention_window": [16],
        },
        PLAIN,
        {},
        0,
        0,
    ),
}
PRUNABLE = ("distilbert", "bert", "minilm", "roberta", "xlm-roberta", "electra")
# The pass `padding` gives each padding token the embedding of the sentence's first token. `POSITIONAL` lists the
# architectures to which the pass `padding` does not apply. DeBERTa and MPNet use relative positions. ModernBERT and
# EuroBERT rotate queries and keys. MobileBERT combines the embeddings of neighbouring tokens.
POSITIONAL = ("deberta-v2", "mobilebert", "mpnet", "modernbert", "eurobert")


def make(folder, kind, **changes):
    """Saves a random classifier whose two logits are so far apart that int8 does not flip its labels."""
    architecture = {**ARCHITECTURES, **OTHERS}[kind]
    labels = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    trained_tokenizer = architecture.tokenizer(inputs.load_embedded().texts)
    tokenizer_class = getattr(transformers, f"{architecture.stem}TokenizerFast", None)
    # For some architectures, such as ModernBERT, transformers has no tokenizer class. Such architectures use the
    # general class PreTrainedTokenizerFast. This class has no default special tokens, so `names` lists these tokens.
    if tokenizer_class is None:
        names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
        tokenizer_class = functools.partial(
            transformers.PreTrainedTokenizerFast, model_input_names=list(PLAIN), **names
        )
    tokenizer = tokenizer_class(tokenizer_object=trained_tokenizer, model_max_length=128)
    config = getattr(transformers, f"{architecture.stem}Config")(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **{**labels, **architecture.config, **changes}
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{architecture.stem}ForSequenceClassification")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        getattr(model.classifier, "out_proj", model.classifier).bias[-1] += 8.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
