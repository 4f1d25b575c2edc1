"""The "icons" set: captioned drawings of everyday things in some twenty styles, built from openly licensed packages.

`python -m datasets.icons --out data/icons` fetches the packages of `sources.toml`, draws them at one size, paints
some of them over in other styles, captions them and writes an image folder that `jaxdiff.data.folder` reads:

    data/icons/train/metadata.jsonl             a line an image: file_name, text (list of captions), subject, style, …
    data/icons/train/images/<source>/….webp     lossless RGBA
    data/icons/heldout_subjects/…               subjects that no training image shows, in any style
    data/icons/heldout_pairs/…                  (subject, style) pairs that training never shows together
    data/icons/LICENSES.md                      where every drawing comes from and under which licence

The flow: `fetch` → `sources` (packages) → `drawings` (one record a drawing, named through `lexicon`) → `variants`
(images with captions and splits) → `render` and `effects` (pixels) → `build` (files). The tables are `sources.toml`
and `words.toml`.
"""
