"""Every sentence of a report in English and Japanese. The page holds both, and its reader chooses."""

from __future__ import annotations

from typing import NamedTuple

from markupsafe import Markup, escape

LANGUAGES = ("en", "ja")


class Text(NamedTuple):
    """One sentence in both languages; fields in braces are filled in by `filled`."""

    en: str
    ja: str

    def filled(self, **values: object) -> Text:
        """With its fields replaced; a value that is a Text gives each language its own."""

        def filled(place: int) -> str:
            return self[place].format(**{name: value[place] if isinstance(value, Text) else value for name, value in values.items()})

        return Text(filled(0), filled(1))

    def __html__(self) -> str:
        return Markup('<span lang="en">{}</span><span lang="ja">{}</span>').format(self.en, self.ja)


def same(text: str) -> Text:
    """A name or a number: the same in both languages."""
    return Text(text, text)


def tspans(text: Text | str) -> Markup:
    """The same inside an SVG's text."""
    if isinstance(text, str):
        return escape(text)
    return Markup('<tspan lang="en">{}</tspan><tspan lang="ja">{}</tspan>').format(*text)


def t(key: str, **values: object) -> Text:
    """The text of a key, with its fields filled in."""
    return TEXTS[key].filled(**values)


def metric_title(title: str) -> Text:
    """What a metric is called; a person's own keeps its name."""
    return METRICS.get(title, same(title))


def label(text: str) -> Text:
    """A control's name in both languages, where we know it; a user's label as it is."""
    return LABELS.get(text, same(text))


METRICS = {
    "accuracy": Text("accuracy", "正解率"),
    "macro F1": Text("macro F1", "マクロF1"),
    "Matthews correlation": Text("Matthews correlation", "マシューズ相関係数"),
    "Spearman correlation": Text("Spearman correlation", "スピアマン相関"),
    "Pearson correlation": Text("Pearson correlation", "ピアソン相関"),
    "mean squared error": Text("mean squared error", "平均二乗誤差"),
    "perplexity": Text("perplexity", "パープレキシティ"),
    "loss": Text("loss", "損失"),
    "exact match": Text("exact match", "完全一致"),
}

LABELS = {
    "words alone": Text("words alone", "単語のみ"),
    "base alone": Text("base alone", "ベースのみ"),
    "uncompressed": Text("uncompressed", "非圧縮"),
    "uncompressed with tuned scale": Text("uncompressed, tuned scale", "非圧縮(倍率を調整)"),
    "prune only": Text("prune only", "枝刈りのみ"),
    "STC with mean magnitude": Text("STC, mean magnitude", "STC(平均絶対値)"),
    "16-bit delta, tuned scale": Text("16-bit delta, tuned scale", "16ビット差分(倍率を調整)"),
    "STC, mean magnitude": Text("STC, mean magnitude", "STC(平均絶対値)"),
    "BitDelta, embeddings too": Text("BitDelta, embeddings too", "BitDelta(埋め込みを含む)"),
    "8 bits, scales by row": Text("8 bits, scales by row", "8ビット(行ごとの倍率)"),
    "4 bits, scales by row": Text("4 bits, scales by row", "4ビット(行ごとの倍率)"),
    "ComPEFT with alpha 1": Text("ComPEFT, alpha 1", "ComPEFT(アルファ1)"),
}

TEXTS = {
    # The page itself
    "page.kind": Text("Report on compressed experts", "圧縮エキスパートの報告書"),
    "page.base": Text("Base model", "ベースモデル"),
    "page.made": Text("Made on", "作成日"),
    "page.numbers": Text("The numbers behind this", "この図の数値"),
    "page.download": Text("Download as CSV", "CSVをダウンロード"),
    "page.skip": Text("Skip to the results", "結果へ移動"),
    "page.interval": Text("Square brackets hold 95 % intervals.", "角括弧内は95 %区間です。"),
    "page.glossary": Text(
        "An expert is a small file of what fine-tuning taught a model. It goes onto the running base model and comes off again, bit for bit.",
        "エキスパートとは、ファインチューニングで学んだ内容だけを収めた小さなファイルです。稼働中のベースモデルに装着し、ビット単位で元に戻せます。",
    ),
    # The verdict
    "verdict.one": Text(
        "For {task}, an expert of {size} stands in for a fine-tuned copy of {copy}, {ratio} its size: {score}{live}.",
        "{task}では、{size}のエキスパートが{copy}のファインチューニング済みモデルの代わりになります({ratio})。{score}{live}。",
    ),
    "verdict.smaller": Text("1/{times} of", "サイズは{times}分の1"),
    "verdict.many": Text(
        "For {n} tasks, experts of {size} in all stand in for fine-tuned copies of {copy}, {ratio} their size: {score}{live}.",
        "{n}件のタスクで、合計{size}のエキスパートが合計{copy}のファインチューニング済みモデルの代わりになります({ratio})。{score}{live}。",
    ),
    "verdict.noise": Text(
        "{metric} is {value} against {tuned} of the tuned model, a difference within noise ({difference})",
        "{metric}は{value}で、チューニング済みモデルの{tuned}との差は誤差の範囲です({difference})",
    ),
    "verdict.worse": Text(
        "{metric} is {value} against {tuned} of the tuned model, measurably worse ({difference})",
        "{metric}は{value}で、チューニング済みモデルの{tuned}を有意に下回ります({difference})",
    ),
    "verdict.better": Text(
        "{metric} is {value} against {tuned} of the tuned model, measurably better ({difference})",
        "{metric}は{value}で、チューニング済みモデルの{tuned}を有意に上回ります({difference})",
    ),
    "verdict.against.base": Text(
        "{metric} is {value} against {base} of the base alone ({difference})", "{metric}は{value}で、ベースのみでは{base}です({difference})"
    ),
    "verdict.alone": Text("{metric} is {value}", "{metric}は{value}です"),
    "verdict.all.noise": Text(
        "each scores as its tuned model within noise (largest loss {difference}, {task})",
        "いずれもスコアはチューニング済みモデルと誤差の範囲で同じです(最大の低下は{task}の{difference})",
    ),
    "verdict.some.worse": Text(
        "{worse} of {compared} score measurably below their tuned models (largest loss {difference}, {task})",
        "{compared}件中{worse}件でスコアがチューニング済みモデルを有意に下回ります(最大の低下は{task}の{difference})",
    ),
    "verdict.uncompared": Text("scores are below", "スコアは以下のとおりです"),
    "verdict.swap": Text("; a swap takes {swap}", "。切り替えは{swap}"),
    "verdict.attach": Text("; attaching takes {attach}", "。装着は{attach}"),
    "verdict.latency": Text(", and inference {ratio} times as long as the base's", "、推論時間はベースの{ratio}倍です"),
    "verdict.none": Text("No step of compression passed its gates for {tasks}.", "{tasks}では、どの圧縮段階も合格条件を満たしませんでした。"),
    "verdict.stopped": Text(
        "For {tasks} no step of compression passed its gates; what follows is about the rest.",
        "{tasks}では、どの圧縮段階も合格条件を満たしませんでした。以下は残りのタスクの結果です。",
    ),
    # Key figures
    "key.size": Text("on disk, one expert", "エキスパート1件のサイズ"),
    "key.size.mean": Text("on disk, an expert on average", "エキスパートの平均サイズ"),
    "key.smaller": Text("smaller than a full copy", "全体コピー比の縮小率"),
    "key.difference": Text("to the tuned model, {metric}", "チューニング済みモデルとの差({metric})"),
    "key.difference.worst": Text("to the tuned model, lowest of all tasks", "チューニング済みモデルとの差(全タスクの最低)"),
    "key.swap": Text("to swap experts, median", "エキスパートの切り替え(中央値)"),
    "key.attach": Text("to attach, median", "装着(中央値)"),
    "key.latency": Text("inference time, to the base's", "推論時間(ベース比)"),
    # Kinds
    "kind.base": Text("base alone", "ベースのみ"),
    "kind.tuned": Text("tuned model", "チューニング済みモデル"),
    "kind.expert": Text("expert", "エキスパート"),
    "kind.chosen": Text("chosen expert", "採用したエキスパート"),
    "kind.control": Text("control", "対照手法"),
    "kind.words": Text("words alone", "単語のみ"),
    "kind.frontier": Text("efficient frontier: nothing smaller scores better", "効率的フロンティア(これより小さくて高スコアのものはない)"),
    "way.expert": Text("expert", "エキスパート"),
    "way.delta": Text("16-bit delta", "16ビット差分"),
    "way.lora": Text("LoRA", "LoRA"),
    "way.copy": Text("full copy", "全体コピー"),
    "way.computed": Text("computed from shapes", "形状からの計算値"),
    "way.measured": Text("measured", "実測値"),
    # Scores
    "scores.title": Text("Scores", "スコア"),
    "scores.lead": Text(
        "Every model answered the same test rows, which nothing was chosen on. A "
        "difference whose interval holds zero is noise: these rows cannot tell it from none.",
        "すべてのモデルを同じテスト行で評価しました。テスト行は選択に使っていません。"
        "区間がゼロを含む差は誤差の範囲であり、この行数では差があるとは言えません。",
    ),
    "scores.rows": Text("{rows} test rows, {metric}", "テスト{rows}行、{metric}"),
    "scores.lower": Text("lower is better", "小さいほど良い"),
    "scores.to.tuned": Text("expert to tuned model", "チューニング済みモデルとの差"),
    "scores.to.base": Text("expert to base", "ベースとの差"),
    "scores.noise": Text("noise", "誤差の範囲"),
    "scores.real": Text("measurable", "有意な差"),
    # Storage
    "storage.title": Text("Storage", "保存容量"),
    "storage.lead": Text("Bytes on disk, header and head included{mean}.", "ヘッダーと出力層を含むディスク上のサイズです{mean}。"),
    "storage.mean": Text(", on average over the tasks", "(全タスクの平均)"),
    "storage.delta": Text(
        "A 16-bit delta holds two bytes for every tuned parameter. LoRA is computed for rank "
        "8 on the modules that PEFT takes by default, where the tuned model is no LoRA itself.",
        "16ビット差分は、調整したすべてのパラメータにつき2バイトです。LoRAは、元がLoRAでない場合、PEFTの既定モジュールにランク8で適用した計算値です。",
    ),
    # Transfer
    "transfer.title": Text("Transfer", "転送時間"),
    "transfer.lead": Text(
        "How long one task takes to arrive: the waiting time, and then its bytes over the link. Both are yours to change.",
        "1タスク分が届くまでの時間です。待ち時間に、回線速度での転送時間を加えています。速度と待ち時間は変更できます。",
    ),
    "transfer.speed": Text("Link speed", "回線速度"),
    "transfer.wait": Text("Waiting time before the first byte, ms", "最初のバイトまでの待ち時間(ms)"),
    "transfer.note": Text("No overhead of a protocol is counted.", "プロトコルのオーバーヘッドは含みません。"),
    # Attach and swap
    "steps.title": Text("Attach and swap", "装着と切り替え"),
    "steps.lead": Text(
        "On the live model in memory. Each stroke is one run; the point is the median, the line joins the quartiles.",
        "メモリ上の稼働モデルで測定しました。縦線は各回の測定値、点は中央値、横線は四分位範囲です。",
    ),
    "steps.first": Text(
        "The first attach of a loaded model took {first}, since it also takes the base's fingerprint, once.",
        "モデル読み込み後の最初の装着は{first}でした。ベースの照合値を一度だけ計算するためです。",
    ),
    "steps.restored": Text(
        "After all runs every tensor of the base was as before, to the bit.", "全測定の後、ベースのすべてのテンソルがビット単位で元に戻りました。"
    ),
    "steps.not.restored": Text("AFTER THE RUNS THE BASE WAS NOT AS BEFORE.", "測定後、ベースが元の状態に戻りませんでした。"),
    "step.attach": Text("attach", "装着"),
    "step.swap": Text("swap", "切り替え"),
    "step.detach": Text("detach", "取り外し"),
    # Latency
    "latency.title": Text("Inference", "推論時間"),
    "latency.lead": Text(
        "One forward pass of {batch} \u00d7 {length} tokens, bare and with an expert on in turn, in {pairs} pairs.",
        "{batch} \u00d7 {length}トークンの順伝播1回を、ベースのみと装着時で交互に{pairs}組測定しました。",
    ),
    "latency.base": Text("base", "ベース"),
    "latency.attached": Text("with an expert on", "エキスパート装着時"),
    "latency.ratio": Text("ratio of the pairs", "組ごとの比"),
    "latency.same": Text("The interval holds 1: no difference was measurable.", "区間が1を含むため、測定できる差はありませんでした。"),
    "latency.slower": Text(
        "The interval lies above 1: inference was measurably slower.", "区間が1を上回るため、推論は測定できる程度に遅くなりました。"
    ),
    "latency.faster": Text(
        "The interval lies below 1: inference was measurably faster.", "区間が1を下回るため、推論は測定できる程度に速くなりました。"
    ),
    # Memory
    "memory.title": Text("Memory", "メモリ"),
    "memory.lead": Text(
        "The base takes {base}, each loaded expert {expert}, and {undo} undo the one that is on.",
        "ベースは{base}、読み込んだエキスパートは1件あたり{expert}、装着中の1件を元に戻すための領域は{undo}です。",
    ),
    "memory.input": Text("Memory for weights, GB", "重みに使えるメモリ(GB)"),
    "memory.experts": Text("tasks as experts beside one base", "ベース1個とエキスパートで扱えるタスク数"),
    "memory.copies": Text("tasks as full copies", "全体コピーで扱えるタスク数"),
    "memory.note": Text(
        "Weights only: activations and caches come on top, in either case.", "重みのみの値です。活性値やキャッシュはどちらの場合も別に必要です。"
    ),
    # Score against bytes
    "frontier.title": Text("Score against bytes", "サイズとスコア"),
    "frontier.lead": Text(
        "Each point is one way to keep the task, by its bytes on disk. Up and to the left is better.",
        "各点は1つの保存方法を表し、横軸はディスク上のサイズです。左上ほど優れています。",
    ),
    "frontier.lead.lower": Text(
        "Each point is one way to keep the task, by its bytes on disk. Down and to the left is better.",
        "各点は1つの保存方法を表し、横軸はディスク上のサイズです。左下ほど優れています。",
    ),
    "frontier.trail": Text("{metric}, what was tried on {rows} rows before choosing", "{metric}、選択前に{rows}行で試した結果"),
    "frontier.axis.x": Text("bytes on disk, logarithmic", "ディスク上のサイズ(対数)"),
    # Density by layer
    "layers.title": Text("Where the changes are", "変更の分布"),
    "layers.lead": Text(
        "The share of entries that the chosen expert changes, layer by layer; “\u2013” is what belongs to no layer, as embeddings.",
        "採用したエキスパートが変更する要素の割合を層ごとに示します。「\u2013」は埋め込みなど層に属さない部分です。",
    ),
    "layers.none": Text("This expert has no coded positions to show by layer.", "このエキスパートには、層ごとに示す符号化された位置がありません。"),
    # Robustness
    "robust.title": Text("Other precisions and threads", "精度とスレッド数"),
    "robust.dtypes": Text(
        "The expert on the base as loaded in another precision. Rounding may swallow updates that are smaller than a step of the narrower type.",
        "別の精度で読み込んだベースに装着した結果です。精度の低い型では、刻み幅より小さい更新が丸めで失われることがあります。",
    ),
    "robust.swallowed": Text("{share} of the updates swallowed", "更新の{share}が丸めで消失"),
    "robust.refused": Text("refused by this expert", "このエキスパートは装着を拒否"),
    "robust.threads": Text("Attaching with more threads gives the same weights, to the bit.", "スレッド数を変えても、重みはビット単位で同じです。"),
    "robust.threads.not": Text("ATTACHING WITH MORE THREADS GAVE OTHER WEIGHTS.", "スレッド数を変えると、異なる重みになりました。"),
    "robust.thread": Text("attach, 1 thread", "装着、1スレッド"),
    "robust.threads.n": Text("attach, {n} threads", "装着、{n}スレッド"),
    # Gates
    "gates.title": Text("Steps and gates", "段階と合格条件"),
    "gates.lead": Text(
        "Compression was raised step by step. The last step of each task that "
        "passed every gate is the chosen one; the first that failed ended the climb.",
        "圧縮率を段階的に上げました。すべての条件を満たした最後の段階を採用し、最初に不合格となった段階で終了しました。",
    ),
    "gates.passed": Text("passed", "合格"),
    "gates.failed": Text("failed", "不合格"),
    "gates.limit": Text("at most {limit}", "{limit}以下"),
    "gate.score": Text("loss of score", "スコアの低下"),
    "gate.bytes": Text("bytes", "サイズ"),
    "gate.latency": Text("inference, to the base's", "推論時間(ベース比)"),
    "gate.attach": Text("attach", "装着"),
    "gate.memory": Text("memory beside the base", "ベース以外のメモリ"),
    # Side by side
    "side.title": Text("Side by side", "複数エキスパートの併用"),
    "side.lead": Text(
        "All experts were swapped among each other on one live model, from each to each, and scored again.",
        "1つの稼働モデル上で、すべてのエキスパートを相互に切り替え、再度評価しました。",
    ),
    "side.same": Text(
        "Every expert answered each row as it does alone, and the base came back to the bit.",
        "どのエキスパートも単独の場合と同じ回答を返し、ベースはビット単位で元に戻りました。",
    ),
    "side.other": Text(
        "NOT EVERY EXPERT ANSWERED AS IT DOES ALONE, OR THE BASE DID NOT COME BACK.",
        "単独の場合と異なる回答があったか、ベースが元に戻りませんでした。",
    ),
    "side.task": Text("expert", "エキスパート"),
    "side.alone": Text("alone", "単独"),
    "side.among": Text("after the swaps", "切り替え後"),
    "side.swap": Text("swap to it, median", "切り替え(中央値)"),
    # What was run
    "run.title": Text("What was run", "実行環境"),
    "run.machine": Text("Machine and versions", "マシンとバージョン"),
    "run.inputs": Text("Files and settings", "ファイルと設定"),
    "run.seconds": Text("Time taken", "所要時間"),
    "run.json": Text("Every number of this report as JSON", "この報告書の全数値(JSON)"),
    "run.method": Text(
        "Intervals: Wilson's for an accuracy, bootstrap over rows for other scores and "
        "for differences on the same rows, Student's on the logarithms of paired times.",
        "区間の計算法は、正解率がウィルソン、その他のスコアと同じ行での差が行のブートストラップ、対になった時間の比が対数のt分布です。",
    ),
    # Tables, where a section has two
    "table.scores": Text("test rows", "テスト行"),
    "table.trail": Text("what was tried", "試した結果"),
    "table.dtypes": Text("precisions", "精度"),
    "table.threads": Text("threads", "スレッド数"),
    # Columns of tables
    "column.task": Text("task", "タスク"),
    "column.kind": Text("kind", "種別"),
    "column.label": Text("label", "名称"),
    "column.metric": Text("metric", "指標"),
    "column.rows": Text("rows", "行数"),
    "column.score": Text("score", "スコア"),
    "column.low": Text("low", "下限"),
    "column.high": Text("high", "上限"),
    "column.to_tuned": Text("to tuned", "チューニング済みとの差"),
    "column.to_tuned_low": Text("low", "下限"),
    "column.to_tuned_high": Text("high", "上限"),
    "column.p": Text("p", "p値"),
    "column.to_base": Text("to base", "ベースとの差"),
    "column.to_base_low": Text("low", "下限"),
    "column.to_base_high": Text("high", "上限"),
    "column.bytes": Text("bytes", "バイト"),
    "column.density": Text("density", "密度"),
    "column.alpha": Text("alpha", "アルファ"),
    "column.chosen": Text("chosen", "採用"),
    "column.frontier": Text("frontier", "フロンティア"),
    "column.way": Text("way", "保存方法"),
    "column.measured": Text("measured", "実測"),
    "column.bits_per_second": Text("bits per second", "ビット毎秒"),
    "column.wait_ms": Text("waiting, ms", "待ち時間(ms)"),
    "column.seconds": Text("seconds", "秒"),
    "column.step": Text("step", "操作"),
    "column.run": Text("run", "回"),
    "column.milliseconds": Text("ms", "ms"),
    "column.what": Text("what", "項目"),
    "column.memory_gb": Text("memory, GB", "メモリ(GB)"),
    "column.experts": Text("experts", "エキスパート"),
    "column.copies": Text("full copies", "全体コピー"),
    "column.layer": Text("layer", "層"),
    "column.entries": Text("entries", "要素数"),
    "column.nonzeros": Text("changed", "変更数"),
    "column.dtype": Text("precision", "精度"),
    "column.to_fp32": Text("to fp32", "fp32との差"),
    "column.to_fp32_low": Text("low", "下限"),
    "column.to_fp32_high": Text("high", "上限"),
    "column.swallowed": Text("swallowed", "消失割合"),
    "column.threads": Text("threads", "スレッド数"),
    "column.same_bits": Text("same bits", "ビット一致"),
    "column.gate": Text("gate", "条件"),
    "column.value": Text("value", "値"),
    "column.limit": Text("limit", "上限値"),
    "column.passed": Text("passed", "合格"),
    "column.alone": Text("alone", "単独"),
    "column.among": Text("after swaps", "切り替え後"),
    "column.same_answers": Text("same answers", "回答一致"),
    "column.swap_ms": Text("swap, ms", "切り替え(ms)"),
}
