package compression

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	pubsub "github.com/push-manager/push-manager/proto"
)

// chatMessage is what a chat back end pushes: some fields that are the same words in
// each message, ids that are random, and text of people.
type chatMessage struct {
	Type      string         `json:"type"`
	ID        string         `json:"message_id"`
	Room      string         `json:"conversation_id"`
	Sender    chatUser       `json:"sender"`
	Text      string         `json:"text"`
	SentAt    string         `json:"sent_at"`
	ReplyTo   string         `json:"reply_to,omitempty"`
	Mentions  []chatUser     `json:"mentions,omitempty"`
	Reactions map[string]int `json:"reactions,omitempty"`
	Files     []chatFile     `json:"attachments,omitempty"`
	Client    *chatClient    `json:"client,omitempty"`
}

type chatUser struct {
	ID     string `json:"user_id"`
	Name   string `json:"display_name"`
	Avatar string `json:"avatar_url,omitempty"`
}

type chatFile struct {
	Name string `json:"file_name"`
	Mime string `json:"mime_type"`
	Size int    `json:"size_bytes"`
	URL  string `json:"url"`
	Hash string `json:"sha256"`
}

type chatClient struct {
	Platform string `json:"platform"`
	Version  string `json:"app_version"`
	Locale   string `json:"locale"`
}

// words is the vocabulary of the chats: common words come first and are drawn more often.
var words = strings.Fields(`the to a I you and it is in of that for on have this we be not with are but what so can just
my me was do at will like if there your all know get they out when up one go no time about good see think from our how or
now need as by more he then some here want make day back really them going right work thanks tomorrow today yeah okay
meeting maybe still sorry people after could sure team great where weekend before should let because tonight morning
call check send week file review release coffee train ticket photo plan question answer server deploy budget customer
dinner weather football birthday kitchen holiday airport doctor garden guitar library museum notebook october password
quarter restaurant schedule telephone umbrella vacation wednesday yesterday invoice contract proposal signature upstairs
ärger übermorgen größer straße naïve café señor mañana niño ¿cómo? 今天 明天 会议 谢谢 好的 没问题 привет спасибо завтра 😀 👍 🎉`)

var names = strings.Fields(`Ada Bao Carlos Dmitri Elif Fatima Giulia Hiro Ines Jonas Keiko Lars Mei Noor Olga Pablo Qing
Rosa Sven Tariq Uma Viktor Wanda Ximena Yusuf Zoë Abbott Brandt Castillo Dubois Eriksen Fischer Gupta Hansen Ivanov Jansen
Kowalski Lindqvist Moreau Nakamura Okafor Petrov Quispe Rossi Schmidt Tanaka Ueda Vargas Weber Xu Yilmaz Zhang`)

// chat draws bodies. The same seed gives the same ones.
type chat struct{ r *rand.Rand }

func newChat(seed uint64) *chat { return &chat{rand.New(rand.NewPCG(seed, 1))} }

func (c *chat) hex(n int) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = "0123456789abcdef"[c.r.IntN(16)]
	}
	return string(b)
}

func (c *chat) uuid() string {
	return strings.Join([]string{c.hex(8), c.hex(4), c.hex(4), c.hex(4), c.hex(12)}, "-")
}

func (c *chat) pick(list ...string) string { return list[c.r.IntN(len(list))] }

func (c *chat) user() chatUser {
	id := c.hex(24)
	return chatUser{
		ID: id, Name: c.pick(names...) + " " + c.pick(names...),
		Avatar: fmt.Sprintf("https://cdn.example.com/avatars/%s/%s.jpg?w=96", id, c.hex(16)),
	}
}

// text is about n bytes of words, of which the common ones are common.
func (c *chat) text(n int) string {
	var b strings.Builder
	for b.Len() < n {
		if b.Len() > 0 {
			b.WriteString(c.pick(" ", " ", " ", " ", " ", " ", ", ", ". ", "\n"))
		}
		x := c.r.Float64()
		b.WriteString(words[int(x*x*float64(len(words)))])
	}
	return b.String()
}

// body is a message of about size bytes of JSON. Large ones carry a long text, people
// and files, small ones the bare minimum.
func (c *chat) body(size int) []byte {
	m := chatMessage{
		Type: "message.created", ID: c.uuid(), Room: c.hex(24),
		Sender: chatUser{ID: c.hex(24), Name: c.pick(names...)},
		SentAt: time.Unix(1_760_000_000+c.r.Int64N(1<<22), c.r.Int64N(1e9)).UTC().Format(time.RFC3339Nano),
	}
	if size >= 1<<10 {
		m.Sender = c.user()
		m.ReplyTo = c.uuid()
		m.Client = &chatClient{c.pick("ios", "android", "web", "desktop"), fmt.Sprintf("%d.%d.%d", 4+c.r.IntN(2), c.r.IntN(20), c.r.IntN(9)), c.pick("en-US", "de-DE", "fr-FR", "zh-CN", "es-MX")}
		for range c.r.IntN(3) {
			m.Mentions = append(m.Mentions, c.user())
		}
		m.Reactions = map[string]int{c.pick("👍", "❤️", "😂"): 1 + c.r.IntN(40), c.pick("🎉", "👀"): 1 + c.r.IntN(9)}
		for range size/(4<<10) + c.r.IntN(2) {
			m.Files = append(m.Files, chatFile{
				Name: c.text(12) + c.pick(".pdf", ".png", ".jpg", ".docx"), Mime: c.pick("application/pdf", "image/png", "image/jpeg"),
				Size: c.r.IntN(1 << 24), URL: "https://files.example.com/" + c.uuid() + "?token=" + c.hex(48), Hash: c.hex(64),
			})
		}
	}
	b := mustJSON(m)
	// The size of real messages varies: three quarters to five quarters.
	if room := size*3/4 + c.r.IntN(size/2) - len(b); room > 0 {
		m.Text = c.text(room * 9 / 10)
		b = mustJSON(m)
	}
	return b
}

func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

// frame is an encoded DeliverRequest with pushes of about size bytes each, to one user
// or to a room in turn.
func (c *chat) frame(pushes, size int) []byte {
	r := &pubsub.DeliverRequest{FirstSeq: 1 + c.r.Uint64N(1<<24)}
	for i := range pushes {
		d := &pubsub.Delivery{Content: &pubsub.MessageContent{
			Data: c.body(size), Timestamp: 1_760_000_000 + c.r.Int64N(1<<22), Metadata: map[string]string{"trace_id": c.hex(32), "tenant": "acme"},
		}}
		if i%2 == 0 {
			d.UserIds = []string{c.hex(24)}
		} else {
			d.Audience = &pubsub.Audience{Id: 1 + c.r.Uint32N(5000), Version: 1 + c.r.Uint32N(40)}
		}
		r.Deliveries = append(r.Deliveries, d)
	}
	b, err := r.MarshalVT()
	if err != nil {
		panic(err)
	}
	return b
}

func (c *chat) random(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(c.r.Uint32())
	}
	return b
}

// TestBodiesAreVaried guards the benchmark: what is compressed must not be one body
// again and again.
func TestBodiesAreVaried(t *testing.T) {
	c, seen := newChat(1), map[string]bool{}
	for _, size := range []int{256, 1 << 10, 8 << 10} {
		total := 0
		for range 200 {
			b := c.body(size)
			if !json.Valid(b) || seen[string(b)] {
				t.Fatalf("not JSON, or twice: %s", b)
			}
			seen[string(b)] = true
			total += len(b)
		}
		if mean := total / 200; mean < size*3/4 || mean > size*3/2 {
			t.Errorf("bodies of %d bytes have %d", size, mean)
		}
	}
}
