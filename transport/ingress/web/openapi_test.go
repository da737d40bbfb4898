package web_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/push-manager/push-manager/docs"
	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/ingress/web"
)

var update = flag.Bool("update", false, "write docs/openapi.yaml")

// object is an object of the document. Its keys come in the order of the alphabet.
type object = map[string]any

// about is what the document says of the methods of the push API, with an example of a request and the reply to it, where
// alice and bob are in the room "lobby".
var about = map[string]struct{ summary, request, reply string }{
	"PushToRoom":       {"Push to everybody in a room", `{"room_id": "lobby", "content": {"data": "SGVsbG8="}, "exclude_user_ids": ["bob"]}`, `{"success": true, "deliveredCount": 1, "message": "delivered to 1 user", "summary": {"targets": 1, "delivered": 1}}`},
	"PushToUser":       {"Push to a user", `{"user_id": "alice", "content": {"data": "SGVsbG8=", "metadata": {"lang": "en"}}}`, `{"success": true, "message": "delivered", "summary": {"targets": 1, "delivered": 1}}`},
	"PushToUsers":      {"Push to several users", `{"user_ids": ["alice", "bob"], "content": {"data": "SGVsbG8="}}`, `{"success": true, "deliveredCount": 2, "message": "delivered to 2 users", "summary": {"targets": 2, "delivered": 2}}`},
	"PushToRooms":      {"Push to everybody in several rooms, each user once", `{"room_ids": ["lobby", "news"], "content": {"data": "SGVsbG8="}, "exclude_user_ids": ["bob"]}`, `{"success": true, "deliveredCount": 1, "message": "delivered to 1 user; 1 of 2 rooms not found", "summary": {"targets": 1, "delivered": 1}}`},
	"BroadcastMessage": {"Push to everybody who is connected", `{"content": {"data": "SGVsbG8="}}`, `{"success": true, "totalDelivered": 2, "message": "delivered to 2 users", "summary": {"targets": 2, "delivered": 2}}`},
	"Explain":          {"Say what would become of a push, and send nothing", "", ""},
	"ForgetUser":       {"Erase what is stored for a user", "", ""},
	"Replay":           {"Send a node what is stored for a user", "", ""},
	"CreateJob":        {"Push one message to many users, at a speed", "", ""},
	"GetJob":           {"A broadcast job and how far it is", "", ""},
	"ListJobs":         {"The broadcast jobs", "", ""},
	"PauseJob":         {"Pause a broadcast job", "", ""},
	"ResumeJob":        {"Go on with a broadcast job", "", ""},
	"CancelJob":        {"End a broadcast job", "", ""},
	"SetJobRate":       {"Change the speed of a broadcast job", "", ""},
	"DeleteJob":        {"Forget a broadcast job that has ended", "", ""},
	"GetRoomMembers":   {"A page of the members of a room", "", ""},
	"GetUsers":         {"Where users are: nodes, rooms and devices", `{"user_ids": ["alice"], "without_connections": true}`, `{"users": [{"userId": "alice", "online": true, "nodeIds": ["connect-node-1"], "roomIds": ["lobby"]}]}`},
	"Disconnect":       {"Close the connections of a user, of a device or in a room", "", ""},
}

// shortExamples are bodies of the short paths. The reply is that of the method.
var shortExamples = map[string]map[string]string{
	"PushToRoom":       {"text": `{"text": "Hello", "exclude_user_ids": ["bob"]}`, "json": `{"json": {"score": [2, 1]}, "type": "SYSTEM", "exclude_user_ids": ["bob"]}`},
	"PushToUser":       {"text": `{"text": "Hello"}`, "data": `{"data": "SGVsbG8=", "metadata": {"lang": "en"}}`},
	"PushToUsers":      {"text": `{"text": "Hello", "user_ids": ["alice", "bob"]}`},
	"PushToRooms":      {"text": `{"text": "Hello", "room_ids": ["lobby", "news"], "exclude_user_ids": ["bob"]}`},
	"BroadcastMessage": {"text": `{"text": "Hello"}`},
	"GetUsers":         {"users": `{"user_ids": ["alice"], "without_connections": true}`},
}

// generator writes the document: an OpenAPI 3.1 description of what is in the .proto files and in the short paths.
type generator struct {
	schemas  object
	requests map[string]bool // of a schema: it is of requests
}

func (g *generator) document() ([]byte, error) {
	g.schemas, g.requests = object{"Error": errorSchema()}, map[string]bool{}
	paths := object{}
	var methods []protoreflect.MethodDescriptor
	for _, in := range []protoreflect.ServiceDescriptor{
		pubsub.File_push_manager_proto.Services().ByName("PushManagerService"), pubsub.File_broadcast_jobs_proto.Services().ByName("BroadcastJobService"),
		pubsub.File_presence_proto.Services().ByName("PresenceService"),
	} {
		for i := range in.Methods().Len() {
			if m := in.Methods().Get(i); !m.IsStreamingClient() && !m.IsStreamingServer() {
				methods = append(methods, m)
			}
		}
	}
	for _, m := range methods {
		name := string(m.Name())
		if about[name].summary == "" {
			return nil, fmt.Errorf("%s is not described: it belongs into about in openapi_test.go", name)
		}
		paths["/"+string(m.Parent().FullName())+"/"+name] = object{"post": g.operation(name, name, object{"$ref": g.schema(m.Input(), true)}, m.Output(), requestExamples(about[name].request))}
		for _, p := range web.ShortPaths() {
			if p.Method != name {
				continue
			}
			examples := object{}
			for key, value := range shortExamples[name] {
				examples[key] = object{"value": fromText(value)}
			}
			id := name + "Short"
			if name == "Disconnect" { // there are several for it
				id = name + map[string]string{"user_id": "User", "room_id": "Room"}[p.ID] + "Short"
			}
			op := g.operation(id, name, g.short(m.Input(), &p), m.Output(), examples)
			if p.ID != "" {
				op["parameters"] = []any{object{"name": p.ID, "in": "path", "required": true, "schema": object{"type": "string"}, "example": map[string]string{"room_id": "lobby", "user_id": "alice"}[p.ID]}}
			}
			paths[p.Path] = object{"post": op}
		}
	}
	paths["/openapi.yaml"] = object{"get": object{
		"operationId": "Document", "summary": "This document",
		"responses": object{"200": object{"description": "The document", "content": object{"application/yaml": object{"schema": object{"type": "string"}}}}},
	}}
	var b bytes.Buffer
	b.WriteString("# Made by `make generate` from the .proto files and transport/ingress/web/openapi_test.go.\n")
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	err := e.Encode(object{
		"openapi": "3.1.0",
		"info": object{
			"title": "Push-Manager", "version": "1", "license": object{"name": "see LICENSE", "url": "https://github.com/push-manager/push-manager/blob/main/LICENSE"},
			"description": "The push API over HTTP. docs/http.md says the rest. Fields of requests may be written as here or in lowerCamelCase. A field that is not known is an error.",
		},
		"servers":  []any{object{"url": "http://localhost:8053"}},
		"security": []any{object{}, object{"bearer": []any{}}, object{"apiKey": []any{}}},
		"paths":    paths,
		"components": object{
			"schemas": g.schemas,
			"securitySchemes": object{
				"bearer": object{"type": "http", "scheme": "bearer", "description": "An API key or a JWT, where AUTH_MODE is required."},
				"apiKey": object{"type": "apiKey", "in": "header", "name": "X-API-Key"},
			},
		},
	})
	return b.Bytes(), err
}

func (g *generator) operation(id, method string, request object, out protoreflect.MessageDescriptor, examples object) object {
	content := object{"schema": request}
	if len(examples) > 0 {
		content["examples"] = examples
	}
	reply := object{"schema": object{"$ref": g.schema(out, false)}}
	if text := about[method].reply; text != "" {
		reply["example"] = fromText(text)
	}
	failure := func(description string) object {
		return object{"description": description, "content": object{"application/json": object{"schema": object{"$ref": "#/components/schemas/Error"}}}}
	}
	later := failure("Too much to do, or more than the caller may: nothing was sent")
	later["headers"] = object{"Retry-After": object{"description": "Seconds", "schema": object{"type": "integer"}}}
	return object{
		"operationId": id, "summary": about[method].summary,
		"requestBody": object{"required": true, "content": object{"application/json": content}},
		"responses": object{
			"200": object{"description": "What became of it. Partial results are results: see success and summary.", "content": object{"application/json": reply}},
			"400": failure("The request is not valid: the field is named"), "401": failure("No credentials, or none that are valid"),
			"403": failure("Not allowed to this caller, or to pages of this origin"), "413": failure("The request is too large"), "429": later,
			"499": failure("The client has gone"), "503": failure("Shutting down, not ready, or the Controller is away"), "504": failure("The deadline passed"),
			"default": failure("Any other error"),
		},
	}
}

func requestExamples(text string) object {
	if text == "" {
		return nil
	}
	return object{"example": object{"value": fromText(text)}}
}

func fromText(text string) any {
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		panic(err)
	}
	return v
}

// schema is a reference to the schema of a message. Requests have the names of the .proto files, replies those of the JSON.
func (g *generator) schema(m protoreflect.MessageDescriptor, request bool) string {
	name := string(m.Name())
	if of, known := g.requests[name]; known && of != request {
		name += map[bool]string{true: "Request", false: "Reply"}[request]
	}
	ref := "#/components/schemas/" + name
	if g.schemas[name] != nil {
		return ref
	}
	if m.FullName() == "google.protobuf.Timestamp" {
		g.schemas[name] = object{"type": "string", "format": "date-time"}
		return ref
	}
	if m.FullName() == "google.protobuf.Duration" {
		g.schemas[name] = object{"type": "string", "description": "Seconds, such as 3600s or 1.5s"}
		return ref
	}
	properties := object{}
	s := object{"type": "object", "properties": properties}
	if request {
		s["additionalProperties"] = false
	}
	g.schemas[name], g.requests[name] = s, request // before its fields, which may be of the same
	for i := range m.Fields().Len() {
		f := m.Fields().Get(i)
		key := f.JSONName()
		if request {
			key = string(f.Name())
		}
		properties[key] = g.field(f, request)
	}
	return ref
}

func (g *generator) field(f protoreflect.FieldDescriptor, request bool) object {
	switch {
	case f.IsMap():
		return object{"type": "object", "additionalProperties": g.value(f.MapValue(), request)}
	case f.IsList():
		return object{"type": "array", "items": g.value(f, request)}
	default:
		return g.value(f, request)
	}
}

func (g *generator) value(f protoreflect.FieldDescriptor, request bool) object {
	switch f.Kind() {
	case protoreflect.BoolKind:
		return object{"type": "boolean"}
	case protoreflect.BytesKind:
		return object{"type": "string", "contentEncoding": "base64"}
	case protoreflect.EnumKind:
		var names []any
		for i := range f.Enum().Values().Len() {
			names = append(names, string(f.Enum().Values().Get(i).Name()))
		}
		return object{"anyOf": []any{object{"type": "string", "enum": names}, object{"type": "integer"}}}
	case protoreflect.Int32Kind:
		return object{"type": "integer", "format": "int32"}
	case protoreflect.Uint32Kind:
		return object{"type": "integer", "minimum": 0}
	case protoreflect.Int64Kind, protoreflect.Uint64Kind:
		return object{"type": []any{"string", "integer"}, "format": "int64"}
	case protoreflect.DoubleKind:
		return object{"type": "number"}
	case protoreflect.MessageKind:
		return object{"$ref": g.schema(f.Message(), request)}
	default:
		return object{"type": "string"}
	}
}

// short is the schema of the body of a short path.
func (g *generator) short(in protoreflect.MessageDescriptor, p *web.ShortPath) object {
	properties := object{}
	for _, name := range p.Fields {
		properties[name] = g.field(in.Fields().ByName(protoreflect.Name(name)), true)
	}
	if p.Plain {
		return object{"type": "object", "properties": properties, "additionalProperties": false}
	}
	maps.Copy(properties, object{
		"text": object{"type": "string", "description": "The data, as text"},
		"json": object{"description": "The data, as any JSON"},
		"data": object{"type": "string", "contentEncoding": "base64", "description": "The data"},
	})
	content := in.Fields().ByName("content").Message().Fields()
	for _, name := range []string{"type", "metadata", "timestamp"} {
		properties[name] = g.field(content.ByName(protoreflect.Name(name)), true)
	}
	one := func(name string) object { return object{"required": []any{name}} }
	return object{"type": "object", "properties": properties, "additionalProperties": false, "oneOf": []any{one("text"), one("json"), one("data")}}
}

func errorSchema() object {
	text := object{"type": "string"}
	return object{
		"type": "object", "required": []any{"code"},
		"properties": object{
			"code":    object{"type": "string", "description": "A code of gRPC, in lower case"},
			"message": text,
			"details": object{"type": "array", "description": "google.rpc.ErrorInfo says that nothing was sent, google.rpc.RetryInfo when to come back, google.rpc.BadRequest which field is wrong", "items": object{
				"type": "object", "properties": object{"type": text, "value": object{"type": "string", "contentEncoding": "base64"}, "debug": object{"type": "object", "description": "The detail as JSON"}},
			}},
		},
	}
}

func TestTheDocumentIsThatOfTheService(t *testing.T) {
	want, err := new(generator).document()
	if err != nil {
		t.Fatal(err)
	}
	const file = "../../../docs/openapi.yaml"
	if *update {
		if err := os.WriteFile(file, want, 0o600); err != nil {
			t.Fatal(err)
		}
	} else if !bytes.Equal(want, docs.OpenAPI) {
		t.Error("docs/openapi.yaml is another one: make generate")
	}
}

// TestExamplesOfTheDocumentHoldForARunningServer sends each one, and compares the reply with the one that stands there.
func TestExamplesOfTheDocumentHoldForARunningServer(t *testing.T) {
	w := newWorld(t)
	resp, served := send(t, clients["HTTP/1.1"], http.MethodGet, w.url+"/openapi.yaml", nil)
	if resp.StatusCode != http.StatusOK || served != string(docs.OpenAPI) {
		t.Fatalf("%d, %d bytes", resp.StatusCode, len(served))
	}
	type content struct {
		JSON struct {
			Example  any
			Examples map[string]struct{ Value any }
		} `yaml:"application/json"`
	}
	var doc struct {
		Paths map[string]struct {
			Post *struct {
				Parameters  []struct{ Name, Example string }
				RequestBody struct{ Content content } `yaml:"requestBody"`
				Responses   map[string]struct{ Content content }
			}
		}
	}
	if err := yaml.Unmarshal([]byte(served), &doc); err != nil {
		t.Fatal(err)
	}
	sent := 0
	for path, p := range doc.Paths {
		if p.Post == nil {
			continue
		}
		for _, q := range p.Post.Parameters {
			path = strings.ReplaceAll(path, "{"+q.Name+"}", q.Example)
		}
		for name, e := range p.Post.RequestBody.Content.JSON.Examples {
			body, err := json.Marshal(e.Value)
			if err != nil {
				t.Fatal(err)
			}
			want, err := json.Marshal(p.Post.Responses["200"].Content.JSON.Example)
			if err != nil {
				t.Fatal(err)
			}
			resp, got := post(t, clients["HTTP/1.1"], w.url+path, string(body), "Content-Type", "application/json")
			var compact bytes.Buffer
			if err := json.Compact(&compact, []byte(got)); err != nil || resp.StatusCode != http.StatusOK || !sameJSON(compact.Bytes(), want) {
				t.Errorf("%s %s: %d %s, want %s", path, name, resp.StatusCode, got, want)
			}
			sent++
		}
	}
	if least := len(shortExamples) + 4; sent < least {
		t.Errorf("%d examples, want %d at least", sent, least)
	}
}

func sameJSON(a, b []byte) bool {
	norm := func(b []byte) []byte {
		var v any
		if json.Unmarshal(b, &v) != nil {
			return b
		}
		out, err := json.Marshal(v)
		if err != nil {
			return b
		}
		return out
	}
	return slices.Equal(norm(a), norm(b))
}

// TestCommandsOfThePageGiveWhatStandsBehindThem runs every curl of docs/http.md.
func TestCommandsOfThePageGiveWhatStandsBehindThem(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("there is no curl")
	}
	w := newWorld(t)
	page, err := os.ReadFile("../../../docs/http.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := strings.Split(string(page), "```")
	ran := 0
	for i := 1; i+2 < len(blocks); i += 2 {
		command, ok := strings.CutPrefix(blocks[i], "sh\n")
		if !ok {
			continue
		}
		want, ok := strings.CutPrefix(blocks[i+2], "json\n")
		if !ok {
			t.Errorf("no reply stands behind %s", command)
			continue
		}
		command = strings.ReplaceAll(strings.Replace(command, "curl", curl+" -s", 1), "localhost:8053", w.stack.HTTPAddress())
		out, err := exec.CommandContext(t.Context(), "sh", "-c", command).Output()
		if err != nil || !sameJSON(out, []byte(want)) {
			t.Errorf("%s: %v\n%s\nwant\n%s", command, err, out, want)
		}
		ran++
	}
	if ran < 5 {
		t.Errorf("%d commands", ran)
	}
}
