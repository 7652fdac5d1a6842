// Fills a chat template as Ollama does: Go's text/template over the messages. Reads jobs, prints texts, both JSON.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type job struct {
	Template string     `json:"template"`
	System   string     `json:"system"` // the Modelfile's
	Messages []*message `json:"messages"`
}

func fill(job job) string {
	if job.System != "" && job.Messages[0].Role != "system" {
		job.Messages = append([]*message{{"system", job.System}}, job.Messages...)
	}
	var told []string
	for _, each := range job.Messages {
		if each.Role == "system" {
			told = append(told, each.Content)
		}
	}
	var text strings.Builder
	values := map[string]any{"System": strings.Join(told, "\n\n"), "Messages": job.Messages, "Response": ""}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(job.Template))
	if err := parsed.Execute(&text, values); err != nil {
		panic(err)
	}
	return text.String()
}

func main() {
	var jobs []job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		panic(err)
	}
	texts := []string{}
	for _, each := range jobs {
		texts = append(texts, fill(each))
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
