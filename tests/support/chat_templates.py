"""Chat templates of several families with the marks of a training template, for tokenizers with Llama-3's tokens."""

TOOLS = """{{- bos_token }}
{%- if tools %}{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" ~ (tools | tojson) ~ "<|eot_id|>" }}{%- endif %}
{%- for message in messages %}
    {{- "<|start_header_id|>" ~ message.role ~ "<|end_header_id|>\\n\\n" }}
    {%- if message.role == "assistant" %}
        {%- generation %}
            {%- if message.tool_calls %}
                {%- for call in message.tool_calls %}{{- "CALL " ~ (call.function | tojson) }}{%- endfor %}
            {%- endif %}
            {{- (message.content or "") | trim ~ "<|eot_id|>" }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content | trim ~ "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{%- endif %}
"""
"""Writes calls and tools as JSON."""

THINKING = """{{- bos_token }}
{%- set last = namespace(question=0) %}
{%- for message in messages %}{%- if message.role == "user" %}{%- set last.question = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {{- "<|start_header_id|>" ~ message.role ~ "<|end_header_id|>\\n\\n" }}
    {%- if message.role == "assistant" %}
        {%- set thought = message.reasoning_content or "" %}
        {%- if "</think>" in content %}
            {%- set thought = content.split("</think>")[0].split("<think>")[-1].strip() %}
            {%- set content = content.split("</think>")[-1].lstrip() %}
        {%- endif %}
        {%- generation %}
            {%- if thought and loop.index0 > last.question %}{{- "<think>" ~ thought ~ "</think>" }}{%- endif %}
            {{- content ~ "<|eot_id|>" }}
        {%- endgeneration %}
    {%- else %}
        {{- content ~ "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{%- endif %}
"""
"""Leaves out what was thought before the last question, as Qwen3's does."""

DATE = """{{- bos_token }}
{%- if strftime_now is defined %}{%- set today = strftime_now("%d %B %Y") %}{%- else %}{%- set today = "26 July 2024" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday is " ~ today ~ "<|eot_id|>" }}
{%- for message in messages %}
    {{- "<|start_header_id|>" ~ message.role ~ "<|end_header_id|>\\n\\n" }}
    {%- if message.role == "assistant" %}
        {%- generation %}{{- message.content ~ "<|eot_id|>" }}{%- endgeneration %}
    {%- else %}
        {{- message.content ~ "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
"""
"""Asks for the date where that can be had, as Llama-3.2's does."""

GENERATION_TAGS = ("{%- generation %}", "{%- endgeneration %}")
