package web

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"slices"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/push-manager/push-manager/engine"
)

// ShortPath is a path that has a shape of its own. Of a push the content is not in a message but beside the rest, and may be
// text or JSON as it is.
type ShortPath struct {
	Path    string   // as http.ServeMux has it
	Service string   // whose method it is, "" for PushManagerService
	Method  string   // of the push API
	ID      string   // the field of its request with what stands in the path, "" for none
	Fields  []string // those that stand in the body, besides those of the content
	Plain   bool     // it is no push: there is no content
}

// The paths, and what of the request's own fields each takes.
var shorts = []ShortPath{ //nolint:gochecknoglobals // a constant
	{Path: "/v1/rooms/{room_id}/messages", Method: "PushToRoom", ID: "room_id", Fields: []string{"exclude_user_ids", "options"}},
	{Path: "/v1/users/{user_id}/messages", Method: "PushToUser", ID: "user_id", Fields: []string{"options"}},
	{Path: "/v1/users/messages", Method: "PushToUsers", Fields: []string{"user_ids", "options"}},
	{Path: "/v1/rooms/messages", Method: "PushToRooms", Fields: []string{"room_ids", "exclude_user_ids", "options"}},
	{Path: "/v1/broadcasts", Method: "BroadcastMessage", Fields: []string{"options"}},
	{Path: "/v1/rooms/{room_id}/members/query", Service: presenceService, Method: "GetRoomMembers", ID: "room_id", Fields: []string{"page_token", "page_size"}, Plain: true},
	{Path: "/v1/users/query", Service: presenceService, Method: "GetUsers", Fields: []string{"user_ids", "without_connections"}, Plain: true},
	{Path: "/v1/users/{user_id}/disconnect", Service: presenceService, Method: "Disconnect", ID: "user_id", Plain: true,
		Fields: []string{"device_id", "code", "reason", "refuse_for", "allow_again"}},
	{Path: "/v1/rooms/{room_id}/disconnect", Service: presenceService, Method: "Disconnect", ID: "room_id", Plain: true,
		Fields: []string{"code", "reason", "refuse_for", "allow_again"}},
}

// Services that have short paths.
const (
	pushService     = "PushManagerService"
	presenceService = "PresenceService"
)

// procedure is the path of the method that it is short for.
func (p *ShortPath) procedure() string {
	return "/pubsub." + cmp.Or(p.Service, pushService) + "/" + p.Method
}

// Fields of every short path.
var (
	dataFields    = []string{"text", "json", "data"} // one of them
	contentFields = []string{"type", "metadata", "timestamp"}
)

// shortHandler serves a short path by the method that it is short for.
func (s *Server) shortHandler(p ShortPath, m *method) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// curl -d says that it is a form. What it is does not depend on that.
		kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
		switch {
		case r.Header.Get("Content-Type") == "", err == nil && slices.Contains([]string{"application/json", "application/x-www-form-urlencoded", "text/plain"}, kind):
			r.Header["Content-Type"] = []string{"application/json"}
		default:
			w.Header().Set("Accept-Post", "application/json")
			s.failWith(w, http.StatusUnsupportedMediaType, errNotJSON)
			return
		}
		id := r.PathValue(p.ID)
		m.serve(w, r, func(b []byte) ([]byte, error) { return p.translate(m, id, b) })
	})
}

// translate makes the protobuf of a request out of the JSON of a short path.
func (p *ShortPath) translate(m *method, id string, b []byte) ([]byte, error) {
	if p.Plain && len(bytes.TrimSpace(b)) == 0 {
		b = []byte("{}")
	}
	given, err := members(b)
	if err != nil {
		return nil, err
	}
	if p.Plain {
		return p.plain(m, id, given)
	}
	var data []byte
	has := ""
	var content, rest bytes.Buffer
	for i := range given {
		f := &given[i]
		switch name := f.name; {
		case slices.Contains(dataFields, name):
			if has != "" {
				return nil, invalid(name, "stands beside "+has+", and one of them is wanted")
			}
			has = name
			if data, err = f.data(); err != nil {
				return nil, err
			}
		case slices.Contains(contentFields, name):
			f.appendTo(&content)
		case slices.Contains(p.Fields, name):
			f.appendTo(&rest)
		default:
			return nil, invalid(name, "is not known; there are "+strings.Join(slices.Concat(dataFields, contentFields, p.Fields), ", "))
		}
	}
	if has == "" {
		return nil, &engine.InvalidError{Field: "text", Code: engine.CodeRequired, Description: "is missing, and so are json and data: one of them is wanted"}
	}
	request, err := m.fill(content.Bytes(), rest.Bytes())
	if err != nil {
		return nil, err
	}
	fields := m.in.Descriptor().Fields()
	if p.ID != "" {
		request.Set(fields.ByName(protoreflect.Name(p.ID)), protoreflect.ValueOfString(id))
	}
	contentField := fields.ByName("content")
	message := request.Mutable(contentField).Message()
	message.Set(contentField.Message().Fields().ByName("data"), protoreflect.ValueOfBytes(data))
	return encode(request.Interface())
}

// plain is translate for a method without a content.
func (p *ShortPath) plain(m *method, id string, given []member) ([]byte, error) {
	var rest bytes.Buffer
	for i := range given {
		f := &given[i]
		if !slices.Contains(p.Fields, f.name) {
			return nil, invalid(f.name, "is not known; there are "+strings.Join(p.Fields, ", "))
		}
		f.appendTo(&rest)
	}
	request, err := m.parse([]byte("{" + strings.TrimPrefix(rest.String(), ",") + "}"))
	if err != nil {
		return nil, err
	}
	if p.ID != "" {
		request.Set(m.in.Descriptor().Fields().ByName(protoreflect.Name(p.ID)), protoreflect.ValueOfString(id))
	}
	return encode(request.Interface())
}

// fill makes a request of members of its content and of itself, each with a comma before it.
func (m *method) fill(content, rest []byte) (protoreflect.Message, error) {
	joined := make([]byte, 0, len(content)+len(rest)+len(`{"content":{}}`))
	joined = append(joined, `{"content":{`...)
	joined = append(joined, bytes.TrimPrefix(content, []byte(","))...)
	joined = append(joined, '}')
	joined = append(joined, rest...)
	joined = append(joined, '}')
	return m.parse(joined)
}

func (m *method) parse(joined []byte) (protoreflect.Message, error) {
	request := m.in.New()
	if err := fromJSON.Unmarshal(joined, request.Interface()); err != nil {
		return nil, jsonError(err)
	}
	return request, nil
}

// member is a name and its value in an object.
type member struct {
	name  string
	value json.RawMessage
}

// members takes an object apart. Its names are compared as they are, and each may stand once.
func members(b []byte) ([]member, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	begin, err := d.Token()
	if err != nil || begin != json.Delim('{') {
		return nil, notObject(err)
	}
	var all []member
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return nil, notObject(err)
		}
		f := member{name: name.(string)} //nolint:forcetypeassert // it is, or there was an error
		if slices.ContainsFunc(all, func(o member) bool { return o.name == f.name }) {
			return nil, invalid(f.name, "stands there twice")
		}
		if len(all) > len(dataFields)+len(contentFields)+4 {
			return nil, invalid("request", "has more members than there are")
		}
		if err := d.Decode(&f.value); err != nil {
			return nil, notObject(err)
		}
		all = append(all, f)
	}
	if _, err := d.Token(); err != nil {
		return nil, notObject(err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, invalid("request", "must be one JSON object, and something follows it")
	}
	return all, nil
}

func notObject(err error) error {
	if err == nil {
		return invalid("request", "must be a JSON object")
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return invalid("request", "must be a JSON object, and ends before it is one")
	}
	return invalid("request", "must be a JSON object: "+err.Error())
}

func invalid(field, description string) error {
	return &engine.InvalidError{Field: field, Code: engine.CodeMalformed, Description: description}
}

// data is the data of a content that the member stands for.
func (f *member) data() ([]byte, error) {
	if !utf8.Valid(f.value) {
		return nil, invalid(f.name, "must be valid UTF-8")
	}
	if f.name == "json" {
		var b bytes.Buffer
		if err := json.Compact(&b, f.value); err != nil {
			return nil, invalid(f.name, err.Error())
		}
		return b.Bytes(), nil
	}
	if len(f.value) == 0 || f.value[0] != '"' {
		return nil, invalid(f.name, "must be a string")
	}
	var text wrapperspb.StringValue // encoding/json would put another character in the place of half a pair
	if fromJSON.Unmarshal(f.value, &text) != nil {
		return nil, invalid(f.name, `has half of a pair of surrogates, such as \ud800, without the other half`)
	}
	if f.name == "text" {
		return []byte(text.GetValue()), nil
	}
	data, err := base64.StdEncoding.DecodeString(text.GetValue())
	if err != nil {
		return nil, invalid(f.name, fmt.Sprintf("must be base64: %v", err))
	}
	return data, nil
}

func (f *member) appendTo(b *bytes.Buffer) {
	b.WriteString(`,"`)
	b.WriteString(f.name) // one of ours
	b.WriteString(`":`)
	b.Write(f.value)
}

// ShortPaths are all of them.
func ShortPaths() []ShortPath { return slices.Clone(shorts) }
