import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from decoding.detokenize import ByteDetokenizer, StopWords, Vocabulary, WindowDetokenizer, detokenizer

TEXT = "Hello, world!  Two spaces.\n\tTab, naïve café. 你好，世界！日本語テキスト 👩‍👩‍👧‍👦 🇩🇪 ok 1234  end\n\n한국어 \ufffd literal"


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken(" né", special=False)])
    tokenizer.post_processor = processors.ByteLevel()
    return tokenizer


def byte_fallback():
    """Llama 2's kind: Metaspace, and bytes for what the vocabulary lacks."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        *"Helo,wrd!Tspac.ab1234n",
        "▁wor",
        "▁Tw",
        "ld",
        "你",
    ]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def word_piece():
    vocabulary = {
        w: i
        for i, w in enumerate(["[UNK]", "[CLS]", "play", "##ing", "##ed", "the", "game", ",", ".", "don", "'", "t"])
    }
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]"])
    return tokenizer


TOKENIZERS = {"byte-level": byte_level, "byte-fallback": byte_fallback, "word-piece": word_piece}


@pytest.fixture(scope="module", params=TOKENIZERS)
def vocabulary(request):
    return Vocabulary(TOKENIZERS[request.param]())


def pieces(vocabulary, ids, rng, longest):
    state, out, at = detokenizer(vocabulary), [], 0
    while at < len(ids):
        n = rng.randint(0, longest)
        out.append(state.push(ids[at : at + n]))
        at += n
    return [*out, state.flush()]


@pytest.mark.parametrize("longest", [1, 2, 3, 9])
def test_pieces_of_a_text_join_to_its_decoding(vocabulary, longest):
    rng = random.Random(longest)
    ids = vocabulary.tokenizer.encode(TEXT).ids
    want = vocabulary.tokenizer.decode(ids)
    for _ in range(10):
        assert "".join(pieces(vocabulary, ids, rng, longest)) == want
    if vocabulary.byte_level:
        assert want == TEXT


@pytest.mark.parametrize("longest", [1, 2, 3, 9])
def test_pieces_of_any_ids_join_to_their_decoding(vocabulary, longest):
    """Random ids: half characters, invalid bytes, special and added tokens anywhere."""
    rng, size = random.Random(longest), vocabulary.tokenizer.get_vocab_size()
    for _ in range(150):
        ids = [rng.randrange(size) for _ in range(rng.randint(0, 40))]
        assert "".join(pieces(vocabulary, ids, rng, longest)) == vocabulary.tokenizer.decode(ids)


def test_no_piece_holds_half_a_character():
    vocabulary = Vocabulary(byte_level())
    text = "你好 👩‍👩‍👧‍👦 café"
    shown = pieces(vocabulary, vocabulary.tokenizer.encode(text).ids, random.Random(0), 1)
    assert not any("\ufffd" in p for p in shown) and "".join(shown) == text


def test_text_comes_as_soon_as_it_is_whole():
    vocabulary = Vocabulary(byte_level())
    state, token = detokenizer(vocabulary), vocabulary.tokenizer.token_to_id
    assert isinstance(state, ByteDetokenizer)
    euro = [token(c) for c in "âĤ¬"]  # the three bytes of the euro sign in GPT-2's alphabet
    assert [state.push([t]) for t in euro] == ["", "", "€"]
    assert state.push([token("Ġ")]) == " "
    assert state.push(euro[:2]) == "" and state.flush() == "\ufffd"


def test_a_space_after_a_special_token_is_not_lost():
    vocabulary = Vocabulary(byte_fallback())
    state, token = detokenizer(vocabulary), vocabulary.tokenizer.token_to_id
    assert isinstance(state, WindowDetokenizer)
    ids = [token(t) for t in ("<s>", "▁wor", "ld", "</s>", "▁Tw", "o", "▁", "▁", "▁wor")]
    assert [state.push([i]) for i in ids] == ["", "wor", "ld", "", " Tw", "o", " ", " ", " wor"]


def test_the_window_stays_short():
    vocabulary = Vocabulary(byte_fallback())
    state, ids = detokenizer(vocabulary), [vocabulary.tokenizer.token_to_id("▁wor")] * 500
    for i in ids:
        state.push([i])
        assert len(state.ids) <= 2


# -- stop words ----------------------------------------------------------------------------------------------------------


def shown(words, chunks):
    """(text shown before the flush, stopped, text shown in all)."""
    stop, out = StopWords(words), ""
    for chunk in chunks:
        visible, stopped = stop.push(chunk)
        out += visible
        if stopped:
            assert stop.push("more") == ("", True)
            return out, True, out + stop.flush()
    return out, False, out + stop.flush()


@pytest.mark.parametrize(
    "words, chunks, before, stopped, whole",
    [
        (["END"], ["abEND rest"], "ab", True, "ab"),
        (["END"], ["abE", "N", "D rest"], "ab", True, "ab"),
        (["END"], ["abE", "Nx"], "abENx", False, "abENx"),
        (["END"], ["ab", "EN"], "ab", False, "abEN"),
        (["\n\n", "###"], ["a\n", "#", "#\n", "\nz"], "a\n##", True, "a\n##"),
        (["aab"], ["aa", "ab"], "a", True, "a"),
        (["abc", "b"], ["a", "b"], "a", True, "a"),
        (["bcd", "abcde"], ["abc", "de"], "a", True, "a"),
        ([], ["abc"], "abc", False, "abc"),
        (["", "x"], ["abc"], "abc", False, "abc"),
        (["停止"], ["你停", "止好"], "你", True, "你"),
    ],
)
def test_stop_words(words, chunks, before, stopped, whole):
    assert shown(words, chunks) == (before, stopped, whole)


def test_stop_words_for_any_chunking_and_no_more_held_back_than_needed():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice("ab") for _ in range(rng.randint(0, 14)))
        words = ["".join(rng.choice("ab") for _ in range(rng.randint(2, 4))) for _ in range(rng.randint(0, 3))]
        chunks, at = [], 0
        while at < len(text):
            n = rng.randint(1, 4)
            chunks.append(text[at : at + n])
            at += n
        stop, out = StopWords(words), ""
        for k, chunk in enumerate(chunks):
            visible, stopped = stop.push(chunk)
            out += visible
            if stopped:
                break
            sofar = "".join(chunks[: k + 1])
            held = max((n for w in words for n in range(len(w)) if sofar.endswith(w[:n]) and n), default=0)
            assert out == sofar[: len(sofar) - held]
        else:
            assert not any(w in text for w in words) and out + stop.flush() == text
            continue
        assert not any(w in out for w in words) and text.startswith(out)
        assert any(text[len(out) :].startswith(w) for w in words)
