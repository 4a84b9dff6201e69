"""What mkdocs.yml cannot say: pages that lie elsewhere, the reference, formulas, links in HTML."""

import html as html_of
import logging
import posixpath
import re
from itertools import groupby
from pathlib import Path

from griffe import Extension
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# Of the repository's root.
PAGES = ("CHANGELOG.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "README.md", "SECURITY.md")
NAMES = ROOT / "tests" / "public_names.txt"
FORMER = {"genfuse.ops.choices", "genfuse.ops.info", "genfuse.ops.use"}  # what has other names now
FORMULA = re.compile(r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', re.DOTALL)


class Formulas(Extension):
    """Formulas of docstrings, from reStructuredText to Markdown."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            text = re.sub(r"\.\. math::\s+(.+?)(?=\n\n|\Z)", r"$$\1$$", obj.docstring.value, flags=re.DOTALL)
            obj.docstring.value = re.sub(r":math:`([^`]+)`", r"$\1$", text)


def on_config(config):
    """Pages that the navigation does not name stand at its end, those of a folder under the folder's name."""
    named = set(re.findall(r"[\w/.-]+\.md", str(config.nav)))
    found = {path.relative_to(config.docs_dir).as_posix() for path in Path(config.docs_dir).rglob("*.md")}
    for folder, pages in groupby(sorted(found - named, key=_folder), _folder):
        config.nav.append({folder.capitalize() or "More": sorted(pages, key=_first)})
    config.nav.append({"Reference": sorted(_reference(), key=_first)})
    return config


def on_files(files, config):
    for source in PAGES:
        page = "index.md" if source == "README.md" else source
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page, content in _reference().items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links from docs/ to the repository's root, and back; what the site does not have is in the repository."""
    folder = Path() if page.file.src_uri in {"index.md", *PAGES} else Path("docs") / _folder(page.file.src_uri)

    def target(match):
        path = re.sub(r"[^/]+/\.\./", "", (folder / match[2]).as_posix())
        if not (ROOT / path).exists():  # code, or a mistake that the build reports
            return match[0]
        if path in PAGES:
            path = "docs/" + ("index.md" if path == "README.md" else path)
        if path.startswith("docs/"):
            # MkDocs turns a link of Markdown into one of the site; HTML it leaves as it stands.
            depth = (page.url if match[1] == 'src="' else page.file.src_uri).count("/")
            return match[1] + "../" * depth + path.removeprefix("docs/")
        return f"{match[1]}{config.repo_url}/blob/main/{path}"

    return re.sub(r"""(\]\(|\bsrc=")(?!\w+:|#)([^)"#\s]+)""", target, markdown)


def on_page_content(html, page, config, files):
    """Formulas as MathML, which browsers draw by themselves."""

    def drawn(match):
        latex = html_of.unescape(match[2])
        latex = re.sub(r"\\(math\w+) (\w)", r"\\\1{\2}", latex)  # \mathbb E: the converter asks for braces,
        latex = re.sub(r"\\(det|exp|log|ln|max|min)\b(?= ?\w| \\(?!left|big))", r"\\\1\\,", latex)  # leaves no space
        return convert(latex, display="block" if match[1] == "[" else "inline")

    return FORMULA.sub(drawn, html)


def on_post_build(config):
    """Warn of links in the site's HTML, pictures too, that lead to no page and no heading."""
    site = Path(config.site_dir)
    pages = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    anchors = {page: {*re.findall(r'\b(?:id|name)="([^"]+)"', text)} for page, text in pages.items()}
    for page, text in pages.items():
        for link in {*re.findall(r'<(?:a|img)\b[^>]*?\b(?:href|src)="([^"]+)"', text)} if page != "404.html" else ():
            path, _, anchor = html_of.unescape(link).partition("#")
            if re.match(r"\w+:|//", path):
                continue
            target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
            target = posixpath.join(target, "index.html") if (site / target).is_dir() else target
            if not (site / target).exists() or (anchor and anchor not in anchors.get(target, ())):
                logging.getLogger("mkdocs.site").warning("%s: %s leads nowhere", page, link)


def _folder(page):
    return page.rpartition("/")[0]


def _first(page):
    """A key of sorting: the page of a folder itself comes first."""
    return page.rpartition("/")[2] not in ("index.md", "README.md"), page.removesuffix(".md")


def _reference():
    """A page for each package, of the public names that the tests hold."""
    names = [re.split(r"[(:]", line)[0] for line in NAMES.read_text(encoding="utf-8").splitlines()]
    names = [name for name in names if name.startswith("genfuse.") and name not in FORMER]
    modules = [name for name in names if (ROOT / "python" / name.replace(".", "/")).with_suffix(".py").exists()]
    top = [name for name in names if name.count(".") == 1]  # of the package itself, by other names of theirs
    pages, packages = {}, []
    for package, members in groupby(sorted({*names} - {*modules, *top}, key=_package), _package):
        options = "{members: false, show_root_heading: false, show_root_toc_entry: false}"
        text = [f"# {package}", f"::: {package}\n    options: {options}", *(f"::: {name}" for name in sorted(members))]
        pages[f"reference/{package}.md"] = "\n\n".join(text)
        packages.append(f"- [`{package}`]({package}.md)")
    source = (ROOT / "python" / "genfuse" / "__init__.py").read_text(encoding="utf-8")
    homes = {name: home for home, name in re.findall(r"^    from ([\w.]+) import (\w+) as \2$", source, re.MULTILINE)}
    shortcuts = ", ".join(f"[`{name}`][{homes[name]}.{name}]" for name in (name.split(".")[1] for name in top))
    about = "All that is public, from its docstrings. [What may change of it](../stability.md) is promised."
    parts = ["# Reference", about, "\n".join(packages), f"`genfuse` itself has {shortcuts}."]
    return {**pages, "reference/index.md": "\n\n".join(parts)}


def _package(name):
    """Its page: modules of `diffusion` and `nn` have one each, models share theirs."""
    parts = name.split(".")
    return ".".join(parts[: 3 if len(parts) == 4 and parts[1] != "models" else 2])
