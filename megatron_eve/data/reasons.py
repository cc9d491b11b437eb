"""Reasons for which preprocessing skips a row of the input, and what it changes of the rows that it keeps."""

from __future__ import annotations

from typing import NamedTuple


class Reason(NamedTuple):
    """Why rows are skipped.

    Attributes:
        what: what is wrong with such a row.
        remedy: what its owner can do, in one clause.
    """

    what: str
    remedy: str


_FIX = "correct the rows, or leave them out"
_DOWNLOAD_AGAIN = "copy or download the file again"

REASONS = {
    "broken_json": Reason(
        "the row is not JSON",
        "correct the line; a file that holds one array must not be named .jsonl or .ndjson",
    ),
    "not_an_object": Reason("the row is not a JSON object", "write each row as {...}"),
    "no_conversation": Reason(
        "'conversations' (or 'messages') is not a list of turns, or has none beside a system turn",
        "give the row a list of turns under that key; for other layouts see --input-format",
    ),
    "two_conversations": Reason(
        "the row has both 'conversations' and 'messages'", "remove one of the two keys"
    ),
    "unknown_role": Reason(
        "a turn is from neither 'human' ('user'), 'gpt' ('assistant') nor 'system'",
        "rename the role, or remove the turns of tools",
    ),
    "message_part": Reason(
        "a part of a message is neither text nor an image",
        "write videos as the row's 'video', or remove the part",
    ),
    "value_not_text": Reason("the value or content of a turn is not text", "write it as a string"),
    "text_not_unicode": Reason(
        "a text is not valid Unicode, such as an emoji cut in two", "write the file again as UTF-8"
    ),
    "text_too_long": Reason("the texts of a row have more than 4 million characters", "split the row"),
    "role_order": Reason(
        "turns do not alternate between 'human' and 'gpt'",
        "join turns of one role that follow each other; a system turn comes first",
    ),
    "chat_template": Reason(
        "the tokenizer's chat template refuses the turns, or does not write an answer as it was",
        "see the detail of the row; a system turn is what most templates refuse",
    ),
    "kind_template": Reason(
        "--template does not take rows of this kind",
        "choose plain for captions, document for interleaved documents, pairs and texts, another one for conversations",
    ),
    "document_turns": Reason(
        "a document, a pair or a text has more than one turn, or one that is not from 'gpt'",
        "write it as one turn from 'gpt'",
    ),
    "plain_turns": Reason(
        "--template plain takes two turns, a question and a caption", "use a template of conversations"
    ),
    "plain_without_image": Reason(
        "--template plain takes captions, and there is no image",
        "use a template of conversations, or --template document for texts",
    ),
    "image_in_caption": Reason(
        "--template plain takes <image> in the question only", "move <image> from the caption to the question"
    ),
    "image_in_system": Reason("a system turn has an image", "move it to the first question"),
    "image_without_placeholder": Reason(
        "the row has an image, but its text no <image>", "write <image> in the question, once for each image"
    ),
    "placeholder_without_image": Reason(
        "the text has <image>, but the row no image",
        "name the file under 'image' or 'images', or remove <image>",
    ),
    "image_count": Reason(
        "not as many <image> (or image parts) as images", "write <image> once for each image"
    ),
    "other_placeholder": Reason(
        "the text has a placeholder such as <image1> or <video> instead of <image>", "write it as <image>"
    ),
    "other_media": Reason("the row has audio and no image", "leave the row out: no model here takes sound"),
    "nothing_to_train": Reason(
        "no token trains: answers are empty or white space, or were cut off",
        "raise --model-max-length if answers were cut off; else fill the answers in, or leave the rows out",
    ),
    "image_field": Reason(
        "'image' (or 'images') is not a file name or a list of them, or the images are under another key",
        "name the files under 'image' or 'images', as text",
    ),
    "image_remote": Reason(
        "the image is a URL, and nothing is downloaded",
        "download the images (img2dataset) and name their files",
    ),
    "image_data_uri": Reason(
        "a data: URI without an image in base64",
        "write data:image/jpeg;base64, and the file in base64 behind it",
    ),
    "image_outside_root": Reason(
        "a path or link that leaves --image-root",
        "name a folder further up as --image-root; for links add --follow-links",
    ),
    "image_missing": Reason(
        "no such file under --image-root",
        "check that --image-root is the folder that the names are relative to, and that all images were unpacked",
    ),
    "image_not_a_file": Reason("a folder, a pipe or a device", "name the image file itself"),
    "image_unreadable": Reason("the file cannot be read", "check its permissions, and the disk"),
    "image_file_too_large": Reason("the file has 2 GiB or more", "write it smaller"),
    "image_empty": Reason("the file is empty", _DOWNLOAD_AGAIN),
    "image_lfs_pointer": Reason(
        "a git-lfs pointer, not the image itself", "run git lfs pull in --image-root"
    ),
    "image_format": Reason(
        "not an image in an accepted format",
        "open one of them: it may be a web page; write others as JPEG or PNG",
    ),
    "image_too_large": Reason(
        "more pixels than --max-image-pixels", "raise --max-image-pixels, or write the image smaller"
    ),
    "image_damaged": Reason("the image is truncated or corrupt", _DOWNLOAD_AGAIN),
    "draw_field": Reason(
        "'draw' is neither true nor false, nor a list of these with one for each image",
        "write true where all images of the row are to be drawn, or a list such as [false, true]",
    ),
    "draw_template": Reason(
        "an image is to be drawn, and samples of --template draw none",
        "choose a template of a family that draws, such as v1, or take 'draw' out of the row",
    ),
    "drawn_in_question": Reason(
        "an image that is to be drawn stands in a question",
        "move its <image> into the answer, or give it false in the list 'draw'",
    ),
    "drawn_without_place": Reason(
        "a video is to be drawn, and no answer has <video>", "write <video> into the answer"
    ),
    "drawn_cut_off": Reason(
        "the image or video that is to be drawn does not fit into --model-max-length",
        "raise --model-max-length: an image takes its rows, a video those of all its frames",
    ),
    "generation_turns": Reason(
        "a row of kind generation has not two turns, from 'human' what is to be drawn and from 'gpt' the image",
        "write the text as a turn from 'human' and <image> as one from 'gpt'",
    ),
    "generation_prompt": Reason(
        "an image or a video is to be drawn, and there is no text to draw it from",
        "give the row a caption, or leave it out",
    ),
    "video_field": Reason(
        "'video' (or 'videos') is not the name of one file", "name one file; make a row of each video"
    ),
    "video_format": Reason(
        "not a video in an accepted container (mp4, mov, webm, mkv, avi, MPEG-TS) and codec",
        "write it as H.264 in mp4, with ffmpeg say",
    ),
    "video_no_frames": Reason("the file has no video stream, or one without frames", _DOWNLOAD_AGAIN),
    "video_too_short": Reason(
        "a video that is to be drawn has fewer frames than --video-frames",
        "nothing if they are few; the model draws that many frames",
    ),
    "video_damaged": Reason("the video is truncated or corrupt", _DOWNLOAD_AGAIN),
    "video_too_long": Reason(
        "the video has more than 1,000,000 frames, or more than 1,000 have to be decoded for one frame",
        "cut it into clips, or write it with more key frames (ffmpeg -g 250)",
    ),
    "key_without_picture": Reason(
        "no image or video among the members of a key (the name up to its first dot)",
        "make the shard again with tar --sort=name: members of a key must be adjacent",
    ),
    "key_twice": Reason(
        "two images, videos, captions or JSON files with the same key", "give each row a key of its own"
    ),
    "member_not_a_file": Reason(
        "a tar member that is a link or a device, which are not followed",
        "make the archive with tar --dereference",
    ),
    "member_outside": Reason(
        "a tar member with an absolute path, or with .. in its name", "make the archive with relative names"
    ),
    "member_too_large": Reason(
        "a caption, or the JSON file of an image, has more than 16 MiB", "shorten it, or leave the row out"
    ),
    "document_layout": Reason(
        "not an MMC4 document: text_list, image_info or similarity_matrix is missing or of a wrong size", _FIX
    ),
    "matched_text_index": Reason("an image of a document is matched to a sentence that does not exist", _FIX),
    "text_field": Reason(
        "a row of text has neither 'text' nor 'inputs' and 'targets'", "rename its key to 'text'"
    ),
    "csv_fields": Reason(
        "a row of the CSV has another number of fields than its header line",
        "put fields with commas in quotation marks",
    ),
    "parquet_row": Reason(
        "an image is null or not bytes, a column has the wrong type, or 'kind' is unknown",
        "correct the column that is named; docs/data.md lists them",
    ),
    "license_dropped": Reason("its license matches --drop-license", "nothing, it was asked for"),
    "opted_out": Reason(
        "its id, a URL or the sha256 of one of its images is listed in --opt-out", "nothing, it was asked for"
    ),
    "download_failed": Reason(
        "img2dataset or video2dataset could not download the file: its status is not success",
        "nothing if they are few; else run it again for the rows that failed",
    ),
}
"""{key under which skipped rows are counted: what it means and what to do}."""

LITERAL_IMAGE = "literal_image"
IMAGES_OVER_LIMIT = "images_over_limit"
IMAGES_AT_END = "images_at_end"
IMAGES_CUT_OFF = "images_cut_off"
CHANGES = {
    IMAGES_OVER_LIMIT: "images left out: beyond the first 6 of a document",
    IMAGES_AT_END: "images left out: at the end of a document, where no text can be learned from them",
    IMAGES_CUT_OFF: "images left out: their place was cut off at --model-max-length",
    LITERAL_IMAGE: "a literal <image> in a text that marks no picture became <IMAGE>",
}
"""{name under which preprocessing counts it: what was changed of a row that was kept}."""
