"""Documents as one model reads them: plain text, text with trained spans, or a conversation in its own template."""

__all__ = ["DocumentEncoder"]

from collections.abc import Sequence
from functools import partial

import numpy as np

from fusejax.data.chat import ChatTemplate, Rendering
from fusejax.data.corpus import Document
from fusejax.errors import InputError
from fusejax.io.tokenizer_rendered import NothingTrained, encode_rendered, mask_encoded
from fusejax.io.tokenizers import EncodedDocument, Tokenizer
from fusejax.types import Array


class DocumentEncoder:
    """A tokenizer that also reads what is trained.

    Args:
      tokenizer: of the model.
      template: of the model; None: conversations are refused.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> None:
        self.tokenizer, self.template = tokenizer, template

    @property
    def fingerprint(self) -> str:
        """What determines the ids of a document."""
        return self.tokenizer.fingerprint + (f"+{self.template.fingerprint}" if self.template else "")

    def encode_batch(self, documents: Sequence[Document]) -> list[EncodedDocument]:
        """Encodes documents; of a masked one, `spans` is set and bytes count those that are trained.

        Raises:
          InputError: a conversation without a template or that the template cannot say, or nothing to train.
        """
        documents = list(documents)  # a corpus makes its documents anew at every look
        plain = iter(self.tokenizer.encode_batch([d.text for d in documents if not d.turns]))
        return [self._conversation(d) if d.turns else self._masked(d, next(plain)) for d in documents]

    def encode_prompts(self, documents: Sequence[Document]) -> list[EncodedDocument | None]:
        """Encodes documents to score what stands before their first trained byte.

        Returns:
          Per document an encoding whose `spans` are that: the contents before the first answer of a conversation,
          without the tokens around them, or the text before the first span. None where there is no such text, or no
          token lies within it.
        """
        return [self._prompt(document) for document in documents]

    def encode(self, document: Document) -> EncodedDocument:
        """Encodes one document; see `encode_batch`."""
        return self.encode_batch([document])[0]

    def _masked(self, document: Document, encoded: EncodedDocument) -> EncodedDocument:
        if document.spans is None:
            return encoded
        where = f"document {document.id!r}"
        return mask_encoded(self.tokenizer, encoded, document.text, document.spans, where=where)

    def _prompt(self, document: Document) -> EncodedDocument | None:
        where = f"document {document.id!r}"
        if document.turns:
            text, contents, spans = self._rendered(document)
            before = sorted({(start, stop) for start, stop in contents if start < stop <= spans[0][0]})
            text = text[: max((stop for _, stop in before), default=0)]
            make = partial(encode_rendered, self.tokenizer, text, contents=contents, needs_stop=False)
        elif document.spans is not None and document.spans[0][0] > 0:
            before = [(0, document.spans[0][0])]
            make = partial(mask_encoded, self.tokenizer, self.tokenizer.encode(document.text), document.text)
        else:
            return None
        if not before:
            return None
        try:
            encoded = make(spans=before, where=where)
        except NothingTrained:
            return None
        scaffold = set(self.tokenizer.special_tokens.values()) - {self.tokenizer.unk_id}
        spans_of: Array = encoded.spans
        counted = np.where(np.isin(encoded.labels, list(scaffold)), -1, spans_of)
        return encoded._replace(spans=counted) if (counted >= 0).any() else None

    def _conversation(self, document: Document) -> EncodedDocument:
        text, contents, spans = self._rendered(document)
        where = f"document {document.id!r}"
        return encode_rendered(self.tokenizer, text, contents=contents, spans=spans, where=where)

    def trained_text(self, document: Document) -> list[str]:
        """The trained spans of a conversation as the model's template writes them."""
        text, _, spans = self._rendered(document)
        return [text[start:stop] for start, stop in spans]

    def _rendered(self, document: Document) -> Rendering:
        where = f"document {document.id!r}"
        if self.template is None:
            raise InputError(f"{where} is a conversation; give the model a `chat_template`")
        for turn in document.turns:
            for _, start, stop in self.tokenizer.find_special(turn.said) if turn.said else ():
                raise InputError(
                    f"{where}: a tool call spells the special token {turn.said[start:stop]!r}, which its rendering "
                    "would be read as; leave the conversation out"
                )
        return self.template.render(document.messages, where=where)
